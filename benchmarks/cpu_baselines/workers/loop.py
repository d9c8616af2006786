"""The loop of a worker: it builds products once, then times them whenever a line asks for it.

Imported by programs that run in environments without this project; it needs numpy alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

REPEATS = {1: 15}
FEW_REPEATS = 3
Products = Callable[[dict[int, Any]], Any]


def shapes_of(spec: dict[str, Any]) -> list[tuple[int, int]]:
    """Return [out, in] of every product: each of the layers has its own weights."""
    return [(rows, columns) for _ in range(spec["layers"]) for rows, columns in spec["shapes"]]


def serve(version: str, run: Products, inputs: Sequence[int]) -> None:
    """Answer each line `M` with the median milliseconds of all products of M tokens.

    Args:
        run: multiplies every weight by the input of its width, given by width.
        inputs: widths of inputs.
    """
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        tokens = int(line)
        generator = np.random.default_rng(0)
        x = {width: generator.standard_normal((tokens, width), np.float32) for width in inputs}
        run(x)
        seconds = []
        for _ in range(REPEATS.get(tokens, FEW_REPEATS)):
            start = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"ms": float(np.median(seconds)) * 1e3}), flush=True)
