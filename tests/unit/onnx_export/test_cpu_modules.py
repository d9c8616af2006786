"""Vision graphs of the CPU against the PyTorch reference, whose towers equal the originals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.module_precision_cases import Replaced
from tests.support.outliers import with_outliers
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.onnxruntime import vision
from vila_deploy.backends.onnxruntime.inference import load_graph, vision_options
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.onnx_export.cpu_modules import CpuModuleEmitter
from vila_deploy.onnx_export.graph_writer import OPSET, GraphWriter, WeightFile
from vila_deploy.onnx_export.smoothing import SmoothedTower, readers_of, smoothing_factors
from vila_deploy.utils.arrays import Floats

TOWERS: dict[str, dict[str, Any]] = {
    "siglip": {},
    "clip": {"tower": "clip"},
    "internvit": {"tower": "internvit"},
}
# Sums in another order.
FLOAT_TOLERANCE = 1e-4
# Gaussian weights and activations, each rounded to int8, through two layers.
INT8_TOLERANCE = 0.02


def features(
    folder: Path, checkpoint: Any, dtype: str, tower: WeightSource | None = None
) -> Floats:
    """Return the features of one tile; `tower` replaces the checkpoint's."""
    config = checkpoint.config
    folder.mkdir()
    source = tower or checkpoint.vision
    parts = (source, checkpoint.projector, vision.cpu_options(dtype))
    vision.write_graphs(folder / "vision", config, *parts, lambda *_: None)
    found, _ = vision.run_tiles(folder / "vision", [pixels(config.vision.image_size)])
    return found[0]


def pixels(size: int) -> Floats:
    return np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)


def error(found: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", TOWERS)
def test_float_and_int8_towers_equal_the_reference(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", **TOWERS[name]))
    reference = ReferenceSession(checkpoint)
    expected = reference.encode_images(pixels(checkpoint.config.vision.image_size))
    assert error(features(tmp_path / "fp16", checkpoint, "fp16"), expected) < FLOAT_TOLERANCE
    found = error(features(tmp_path / "int8", checkpoint, "int8"), expected)
    assert FLOAT_TOLERANCE < found < INT8_TOLERANCE


def product(folder: Path, x: Floats, weight: torch.Tensor) -> Floats:
    """Return x · Wᵀ in int8."""
    name = "encoder.layers.0.mlp.fc1"
    source: Any = Replaced(None, {f"{name}.weight": weight})
    graph = GraphWriter(OPSET)
    graph.input("x", np.float32, [*x.shape])
    graph.output("y", np.float32, [1, x.shape[1], len(weight)])
    with WeightFile(folder / "model.data") as file:
        y = CpuModuleEmitter(graph, source, file, int8=True).linear("x", name, bias=False)
        graph.node("Identity", y, output="y")
    graph.save(folder / "model.onnx")
    session = load_graph(folder / "model.onnx", options=vision_options())
    result: Floats = session.run(["y"], {"x": x})[0]
    return result


def test_rows_are_rounded_by_their_own_extent(tmp_path: Path) -> None:
    """A row of zeros stays zero, and one of huge values leaves the others as exact as before."""
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 6, 64), np.float32)
    x[0, 2], x[0, 4] = 0, x[0, 4] * 1e4
    weight = torch.from_numpy(random.standard_normal((48, 64), np.float32))
    found, expected = product(tmp_path, x, weight)[0], x[0] @ weight.numpy().T
    assert not found[2].any()
    for row in (0, 1, 3, 4, 5):
        assert error(found[row], expected[row]) < INT8_TOLERANCE


@pytest.mark.parametrize("name", TOWERS)
def test_smoothing_takes_outlier_channels_out_of_activations(tmp_path: Path, name: str) -> None:
    plain = open_checkpoint(make_checkpoint(tmp_path / "c", **TOWERS[name]))
    checkpoint = with_outliers(plain)
    config, tower = checkpoint.config, checkpoint.vision
    expected = features(tmp_path / "plain", plain, "fp16")
    readers = readers_of(config)
    scratch = tmp_path / "scratch"
    options = vision.cpu_options("fp16", frozenset(readers.values()))
    vision.write_graphs(scratch, config, tower, checkpoint.projector, options, lambda *_: None)
    tiles = [pixels(config.vision.image_size)]
    _, extents = vision.run_tiles(scratch, tiles, frozenset(readers.values()))
    factors: Mapping[str, torch.Tensor] = smoothing_factors(tower, readers, extents)
    smoothed = SmoothedTower(tower, factors, readers)
    exact = features(tmp_path / "exact", checkpoint, "fp16", smoothed)
    assert error(exact, expected) < 3e-3  # float16 weights
    before = error(features(tmp_path / "before", checkpoint, "int8"), expected)
    after = error(features(tmp_path / "after", checkpoint, "int8", smoothed), expected)
    assert after < 1.5 * INT8_TOLERANCE < before
    assert after < before / 10
