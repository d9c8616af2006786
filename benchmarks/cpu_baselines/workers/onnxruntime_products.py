"""The same products as our CPU engine computes them: `python onnxruntime_products.py SPEC KIND`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from loop import serve, shapes_of

from vila_deploy.backends.onnxruntime.inference import load_graph
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.onnx_export.dialects.onnxruntime import OnnxRuntimeDialect
from vila_deploy.onnx_export.graph_writer import GraphWriter, WeightFile


def main() -> None:
    spec = json.loads(sys.argv[1])
    shapes = shapes_of(spec)
    widths = sorted({columns for _, columns in shapes})
    with tempfile.TemporaryDirectory(dir=spec["folder"]) as scratch:
        graph = Path(scratch) / "products.onnx"
        names = write_products(graph, shapes, spec["group"])
        session = load_graph(graph)
    version = onnxruntime.__version__
    serve(version, lambda x: session.run(names, {f"x{w}": x[w] for w in widths}), widths)


def write_products(path: Path, shapes: list[tuple[int, int]], group: int) -> list[str]:
    """Write a graph of int4 products with int8 activations and return its outputs' names."""
    dialect, graph = OnnxRuntimeDialect(int8_terms=1), GraphWriter()
    widths = sorted({columns for _, columns in shapes})
    inputs = {width: graph.input(f"x{width}", np.float32, ["tokens", width]) for width in widths}
    names = []
    with WeightFile(path.with_suffix(".data")) as file:
        for number, (rows, columns) in enumerate(shapes):
            weight = QuantizedLinear(
                q=torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
                scale=torch.full((rows, columns // group), 0.01, dtype=torch.float16),
                zero=torch.randint(6, 10, (rows, columns // group), dtype=torch.uint8),
            )
            stored = dialect.store_linear(file, f"weight{number}", [weight])
            product = dialect.linear(graph, inputs[columns], stored)
            names.append(graph.output(f"y{number}", np.float32, ["tokens", rows]))
            graph.node("Identity", product, output=names[-1])
    graph.save(path)
    return names


if __name__ == "__main__":
    main()
