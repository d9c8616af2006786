"""Measure how fast this computer reads memory: the ceiling of batch-1 decoding on its CPU."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

REPETITIONS = 5
SMALLEST_PASS_BYTES = 256 << 20
# Below this a pass would time calls, not reading.
SMALLEST_BUFFER_BYTES = 64 << 10


def read_bandwidth_bytes_per_s(size_bytes: int, threads: int | None = None) -> float:
    """Return bytes per second of the fastest of several passes over a buffer of `size_bytes`.

    Integer sums in one thread a core (or `threads`); the buffer is written first, so that every
    page exists. The fastest pass gives the smallest share that an engine reaches. A small buffer,
    which fits into caches, is read many times over, so that starting threads takes no part.
    """
    threads = threads or len(os.sched_getaffinity(0))
    buffer = np.ones(max(size_bytes, SMALLEST_BUFFER_BYTES) // 8, np.int64)
    rounds = max(1, SMALLEST_PASS_BYTES // buffer.nbytes)

    def read(part: NDArray[np.int64]) -> None:
        for _ in range(rounds):
            part.sum()

    slices = np.array_split(buffer, threads)
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            list(pool.map(read, slices))
            best_s = min(best_s, time.perf_counter() - start)
    return buffer.nbytes * rounds / best_s
