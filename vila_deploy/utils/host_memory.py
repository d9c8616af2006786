"""The most memory that this process holds while something runs."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
SAMPLE_EVERY_S = 0.02
# Pages of files that are mapped, as checkpoints are, are given back whenever memory runs short.
OWN_PAGES = ("RssAnon:", "RssShmem:")


class PeakMemory:
    """Samples the process's own memory, that is without mapped files, while it is open.

    Linux counts the peak of everything together only. Where there is no /proc, that is what
    `own_bytes` says too.
    """

    def __init__(self) -> None:
        self._peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        if STATUS.exists():
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()

    @property
    def own_bytes(self) -> int:
        """The peak so far, in samples every 20 ms."""
        if not STATUS.exists():
            return resident_bytes()
        self._peak_bytes = max(self._peak_bytes, own_bytes())
        return self._peak_bytes

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self._peak_bytes = max(self._peak_bytes, own_bytes())


def own_bytes() -> int:
    """What this process holds at present, without mapped files (Linux)."""
    lines = STATUS.read_text("ascii", "replace").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(OWN_PAGES))


def resident_bytes() -> int:
    """The most that this process has had in memory since it began, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Returns freed memory to the system, where the C library can.

    glibc keeps what lies between pieces that are still in use; over many layers that adds up.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
