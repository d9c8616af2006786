"""How busy other processes keep this computer while an engine is measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
# A measurement is noisy if others take more than this of one core.
NOISY_CORES = 0.10


@dataclass(frozen=True)
class _Snapshot:
    """Seconds since the start of the system: the clock, all cores' work, ours, and stolen ones."""

    clock_s: float
    busy_s: float
    own_s: float
    stolen_s: float


@dataclass(frozen=True)
class HostLoad:
    """How many cores others kept busy on average.

    Args:
        stolen_cores: of them those that the host of a virtual machine gave to other guests.
    """

    others_cores: float
    stolen_cores: float


class LoadMonitor:
    """Counts the work of other processes from its creation to each call of `load`.

    Work of other guests on the same host shows as stolen time only, and counts as theirs. Without
    /proc/stat, as on macOS, nothing is known.
    """

    def __init__(self, stat: Path = STAT):
        self._stat = stat
        self._start = _snapshot(stat)

    def load(self) -> HostLoad | None:
        """Return how busy others were, stolen time included; None where that is unknown."""
        now = _snapshot(self._stat)
        if self._start is None or now is None:
            return None
        seconds = max(now.clock_s - self._start.clock_s, 1e-9)
        busy = now.busy_s - self._start.busy_s - (now.own_s - self._start.own_s)
        stolen = now.stolen_s - self._start.stolen_s
        return HostLoad(max(0.0, busy + stolen) / seconds, stolen / seconds)


def load_before(seconds: float = 1.0) -> float | None:
    """Return how many cores others keep busy now, while this process waits for `seconds`."""
    monitor = LoadMonitor()
    time.sleep(seconds)
    load = monitor.load()
    return None if load is None else load.others_cores


def is_noisy(*others_cores: float | None) -> bool:
    """Return whether others took more than NOISY_CORES at any of these times."""
    return any(cores is not None and cores > NOISY_CORES for cores in others_cores)


def _snapshot(stat: Path) -> _Snapshot | None:
    try:
        first = stat.read_text("ascii").partition("\n")[0].split()
    except OSError:
        return None
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in first[1:]]
    # user, nice, system, idle, iowait, irq, softirq, steal, …
    user, nice, system, _, _, irq, softirq, stolen = ticks[:8]
    times = os.times()
    return _Snapshot(
        clock_s=time.monotonic(),
        busy_s=user + nice + system + irq + softirq,
        own_s=times.user + times.system,
        stolen_s=stolen,
    )
