"""Measure how fast this computer reads memory: the ceiling of batch-1 decoding on its CPU."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

REPETITIONS = 5
SMALLEST_PASS_BYTES = 256 << 20
# Below this a pass would time calls, not reading.
SMALLEST_BUFFER_BYTES = 64 << 10
# A buffer that few processors hold in their caches.
LARGE_BUFFER_BYTES = 256 << 20
READING_S = 0.1
# Threads of an engine wait actively for their next step, but not for so long.
REST_S = 0.1
# Between readings, lest quick measurements take longer for them.
PAUSE_S = 2.0


def read_bandwidth_bytes_per_s(size_bytes: int, threads: int | None = None) -> float:
    """Return bytes per second of the fastest of several passes over a buffer of `size_bytes`.

    Integer sums in one thread a core (or `threads`); the buffer is written first, so that every
    page exists. The fastest pass gives the smallest share that an engine reaches. A small buffer,
    which fits into caches, is read many times over, so that starting threads takes no part.
    """
    threads = threads or len(os.sched_getaffinity(0))
    buffer = np.ones(max(size_bytes, SMALLEST_BUFFER_BYTES) // 8, np.int64)
    with ThreadPoolExecutor(threads) as pool:
        return max(_pass_bytes_per_s(pool, buffer, threads) for _ in range(REPETITIONS))


class BandwidthReadings:
    """Readings of the memory's bandwidth in bytes per second, between parts of a measurement.

    On a shared host the bandwidth changes within seconds, so that one reading says little, and
    the fastest pass says less: each reading is the median of the passes of READING_S. Its memory
    is given back after it.
    """

    def __init__(self, size_bytes: int = LARGE_BUFFER_BYTES, pause_s: float = PAUSE_S):
        self._size, self._pause_s, self._due = size_bytes, pause_s, 0.0
        self.readings: list[float] = []

    def read(self) -> None:
        """Add a reading, unless the last one is younger than the pause between two."""
        if time.monotonic() < self._due:
            return
        time.sleep(REST_S)
        threads = len(os.sched_getaffinity(0))
        passes: list[float] = []
        # Pages of the size that the system gives those who don't ask, as to an engine's weights;
        # numpy asks for large ones.
        with mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            buffer = np.frombuffer(memory, np.int64)
            buffer.fill(1)
            end = time.perf_counter() + READING_S
            with ThreadPoolExecutor(threads) as pool:
                while not passes or time.perf_counter() < end:
                    passes.append(_pass_bytes_per_s(pool, buffer, threads))
            del buffer  # before its memory is unmapped
        self.readings.append(statistics.median(passes))
        self._due = time.monotonic() + self._pause_s

    def median(self) -> float:
        """Return the median of the readings so far."""
        return statistics.median(self.readings)


def _pass_bytes_per_s(pool: ThreadPoolExecutor, buffer: NDArray[np.int64], threads: int) -> float:
    rounds = max(1, SMALLEST_PASS_BYTES // buffer.nbytes)

    def read(part: NDArray[np.int64]) -> None:
        for _ in range(rounds):
            part.sum()

    slices = np.array_split(buffer, threads)
    start = time.perf_counter()
    list(pool.map(read, slices))
    return buffer.nbytes * rounds / (time.perf_counter() - start)
