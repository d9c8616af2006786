"""A decoding step's products in OpenVINO: `python openvino_products.py SPEC KIND`."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import openvino as ov
from loop import serve, shapes_of
from openvino import opset13 as op

BITS = {"int4": 4, "int8": 8}
ZERO = {4: 8, 8: 128}
KEPT = []  # OpenVINO reads 4-bit constants where they lie.


def weight(rows: int, columns: int, group: int, kind: str, generator: np.random.Generator):  # type: ignore[no-untyped-def]
    """Return the node of a weight as OpenVINO's kernels take it in its compressed form."""
    if kind == "bf16":
        values = generator.standard_normal((rows, columns), np.float32).astype(np.float16)
        return op.convert(op.constant(values), "f32")
    bits, groups = BITS[kind], columns // group
    raw = generator.integers(0, 256, rows * columns * bits // 8, dtype=np.uint8)
    KEPT.append(raw)
    shape = ov.Shape([rows, groups, group])
    tensor = ov.Tensor(raw, shape, ov.Type.u4 if bits == 4 else ov.Type.u8)
    KEPT.append(tensor)
    scale = op.constant(np.full((rows, groups, 1), 0.01, np.float16))
    zero = op.constant(np.full((rows, groups, 1), ZERO[bits], np.uint8))
    values = op.subtract(op.convert(op.constant(tensor), "f16"), op.convert(zero, "f16"))
    wide = op.reshape(op.multiply(values, scale), np.array([rows, columns], np.int64), False)
    return op.convert(wide, "f32")


def main() -> None:
    spec, kind = json.loads(sys.argv[1]), sys.argv[2]
    shapes, generator = shapes_of(spec), np.random.default_rng(0)
    widths = sorted({columns for _, columns in shapes})
    inputs = {width: op.parameter([-1, width], np.float32, name=f"x{width}") for width in widths}
    outputs = [
        op.matmul(
            inputs[columns], weight(rows, columns, spec["group"], kind, generator), False, True
        )
        for rows, columns in shapes
    ]
    settings = {
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if kind == "bf16" else spec["group"],
    }
    model = ov.Model(outputs, list(inputs.values()), "products")
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    serve(ov.__version__, lambda x: request.infer([x[width] for width in widths]), widths)


if __name__ == "__main__":
    main()
