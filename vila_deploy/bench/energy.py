"""Energy that the processor takes, from the counters (RAPL) that Linux shows of it."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts the joules of all processor packages from its creation on.

    The counters are readable by root only on most systems: then nothing is known.
    """

    def __init__(self, powercap: Path = POWERCAP):
        # intel-rapl:0 is a package; intel-rapl:0:1 a part of it, which it contains.
        self._packages = [
            folder
            for folder in sorted(powercap.glob("intel-rapl:*"))
            if folder.name.count(":") == 1
        ]
        self._start = self._read()

    def joules(self) -> float | None:
        """Return the joules so far; None if no counter can be read."""
        now = self._read()
        if not self._start or not now:
            return None
        total = 0
        for folder, before, after in zip(self._packages, self._start, now, strict=True):
            # The counter begins anew at its largest value.
            if after < before:
                after += int((folder / "max_energy_range_uj").read_text())
            total += after - before
        return total / 1e6

    def _read(self) -> list[int]:
        try:
            return [int((folder / "energy_uj").read_text()) for folder in self._packages]
        except OSError:
            return []
