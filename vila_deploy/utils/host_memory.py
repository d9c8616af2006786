"""Measure the peak memory of this process."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
SAMPLE_EVERY_S = 0.02
# Not pages of mapped files, as checkpoints are: the system drops them whenever memory is short.
OWN_PAGES = ("RssAnon:", "RssShmem:")


class PeakMemory:
    """Samples the process's memory without mapped files while it is open.

    Linux itself counts only the peak with mapped files. Without /proc, `own_bytes` is that
    peak, too.
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
    """Return the present memory of this process without mapped files (Linux)."""
    lines = STATUS.read_text("ascii", "replace").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(OWN_PAGES))


def resident_bytes() -> int:
    """Return the peak memory of this process since it began, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return freed memory to the system, where the C library can.

    glibc keeps free memory between blocks in use; over many layers that adds up.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
