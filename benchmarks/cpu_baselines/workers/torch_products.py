"""A decoding step's products by PyTorch's int4 operator: `python torch_products.py SPEC KIND`."""

from __future__ import annotations

import json
import os
import sys

import torch
from loop import serve, shapes_of

INNER_TILES = 2


def main() -> None:
    spec = json.loads(sys.argv[1])
    shapes, group = shapes_of(spec), spec["group"]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = []
    for rows, columns in shapes:
        values = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, INNER_TILES)
        scales = torch.full((columns // group, rows, 2), 0.01, dtype=torch.bfloat16)
        weights.append((packed, scales, columns))

    def run(x: dict) -> None:  # type: ignore[type-arg]
        half = {width: torch.from_numpy(values).bfloat16() for width, values in x.items()}
        for packed, scales, columns in weights:
            torch.ops.aten._weight_int4pack_mm_for_cpu(half[columns], packed, group, scales)

    with torch.inference_mode():
        serve(torch.__version__, run, sorted({columns for _, columns in shapes}))


if __name__ == "__main__":
    main()
