"""How fast this host reads memory: the ceiling of batch-1 decoding."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

REPETITIONS = 5
SLICES_PER_THREAD = 8


def read_bandwidth_bytes_per_s(size_bytes: int, threads: int | None = None) -> float:
    """Bytes per second of the fastest of several passes over a buffer of `size_bytes`.

    Integer sums in one thread a core (or `threads`); the buffer is written first, so that every
    page is real. The fastest pass is taken: it makes the share that an engine reaches smallest.
    """
    threads = threads or len(os.sched_getaffinity(0))
    buffer = np.ones(max(size_bytes // 8, 1), np.int64)
    slices = np.array_split(buffer, threads * SLICES_PER_THREAD)
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            list(pool.map(np.sum, slices))
            best_s = min(best_s, time.perf_counter() - start)
    return buffer.nbytes / best_s
