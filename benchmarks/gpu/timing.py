"""Seconds of a launch: CUDA graphs over buffers that no cache holds, median of many replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

REPLAYS = 21
DISCARDED = 3  # replays before those
# Between the first and the last use of a buffer lies this many times the L2.
CACHES = 3


def copies_needed(size_bytes: int, device: str) -> int:
    """Return how many sets of inputs to rotate over, so that the L2 holds none of them."""
    if device == "cpu":
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-CACHES * l2 // max(size_bytes, 1)))


def seconds(calls: Sequence[Callable[[], object]], device: str, repeats: int = 1) -> float:
    """Return median seconds of one call; `calls` do the same over different inputs.

    All are captured `repeats` times into one graph, which is replayed; CUDA events time it.
    """
    if device == "cpu":
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    found = replay_seconds(graph, DISCARDED + REPLAYS)[DISCARDED:]
    return statistics.median(found) / (repeats * len(calls))


def replay_seconds(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Return seconds of each of `count` replays by CUDA events.

    All are queued before the host waits, so that no replay waits for its launch.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]
