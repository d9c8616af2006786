"""Measure how far rounding moves a vision tower's hidden states, behind each of its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from vila_deploy.backends.onnxruntime.inference import load_graph
from vila_deploy.utils.arrays import Floats

# What `towers.tower` calls the scope of a layer.
LAYER_SCOPE = re.compile(r"layer_(\d+)/")
GRAPH_SUFFIX = ".layers.onnx"


def write_hidden_states(
    graph: Path, tiles: Sequence[Floats], options: Mapping[str, str], folder: Path
) -> None:
    """Run a vision graph and write the hidden states behind each layer into the new `folder`.

    Args:
        tiles: pixels [1, 3, size, size] each.
        options: onnxruntime's configuration entries of the session.
    """
    folder.mkdir()
    with_outputs = graph.with_suffix(GRAPH_SUFFIX)
    names = _add_layer_outputs(graph, with_outputs)
    session = load_graph(with_outputs, options=options)
    for number, pixels in enumerate(tiles):
        states = session.run(names, {"pixels": np.ascontiguousarray(pixels)})
        for layer, values in enumerate(states):
            np.save(folder / _file(layer, number), values)
    with_outputs.unlink()


def layer_errors(folder: Path, expected: Path) -> tuple[float, ...]:
    """Return the relative error (norm of the difference over norm) behind each layer, all tiles.

    Args:
        folder, expected: from `write_hidden_states`, of the same tiles.
    """
    count = 1 + max(int(file.name.partition("-")[0]) for file in expected.glob("*.npy"))
    return tuple(_relative_error(layer, folder, expected) for layer in range(count))


def _relative_error(layer: int, folder: Path, expected: Path) -> float:
    difference = norm = 0.0
    for file in sorted(expected.glob(_file(layer, "*"))):
        reference, found = (np.load(path) for path in (file, folder / file.name))
        difference += float(np.square(found - reference, dtype=np.float64).sum())
        norm += float(np.square(reference, dtype=np.float64).sum())
    return math.sqrt(difference / norm) if norm else 0.0


def _add_layer_outputs(graph: Path, out: Path) -> list[str]:
    """Write `graph` beside its weights as `out`, with an output behind each layer; their names."""
    model = onnx.load(graph, load_external_data=False)
    last: dict[int, str] = {}
    for node in model.graph.node:
        scope = LAYER_SCOPE.match(node.name)
        if scope:
            last[int(scope[1])] = node.output[0]
    known = {output.name for output in model.graph.output}
    for name in last.values():
        if name not in known:
            kind = onnx.TensorProto.FLOAT
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    out.write_bytes(model.SerializeToString(deterministic=True))
    return [last[layer] for layer in sorted(last)]


def _file(layer: int, number: int | str) -> str:
    return f"{layer}-{number}.npy"
