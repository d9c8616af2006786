"""Write the vision encoder of a CPU engine; in int8 with its channels smoothed and its error known.

Error: relative norm of the difference between the features of an image and those of float32, the
largest over held-out drawn images.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.inference import load_graph, vision_options
from vila_deploy.backends.onnxruntime.memory import float_tower_bytes
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.data import drawn_scenes, drawn_scenes_eval
from vila_deploy.data.drawn_scenes import Scene
from vila_deploy.formats.module_dtypes import FP16, INT8
from vila_deploy.onnx_export.cpu_modules import extent_name
from vila_deploy.onnx_export.graph_writer import OPSET, WeightFile
from vila_deploy.onnx_export.smoothing import SmoothedTower, readers_of, smoothing_factors
from vila_deploy.onnx_export.vision import (
    VisionGraphOptions,
    build_projector_graph,
    build_vision_graph,
)
from vila_deploy.processing.images import preprocess
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.estimates import available_memory_bytes
from vila_deploy.utils.progress import Advance

# Largest error with which int8 is taken where the user leaves the choice.
FEATURE_ERROR_BOUND = 0.05
CALIBRATION_IMAGES = HELD_OUT_IMAGES = 3
SCRATCH = "scratch"


def write_vision(
    folder: Path,
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    dtype: str,
    advance: Advance,
) -> float | None:
    """Write vision/ into `folder` and return the error of an int8 tower.

    None: the tower is float16, or there is no memory to run it in float32 beside this process. It
    is then not smoothed either.
    """
    if dtype == FP16:
        write_graphs(folder / files.VISION, config, tower, projector, cpu_options(FP16), advance)
        return None
    if available_memory_bytes() < float_tower_bytes(config):
        write_graphs(folder / files.VISION, config, tower, projector, cpu_options(INT8), advance)
        return None
    held_out = held_out_tiles(config)
    scratch = folder / SCRATCH
    smoothed = smooth_tower(scratch, config, tower, projector)
    expected, _ = run_tiles(scratch, held_out)
    shutil.rmtree(scratch)
    write_graphs(folder / files.VISION, config, smoothed, projector, cpu_options(INT8), advance)
    found, _ = run_tiles(folder / files.VISION, held_out)
    return largest_error(found, expected)


def smooth_tower(
    scratch: Path, config: VilaConfig, tower: WeightSource, projector: WeightSource
) -> SmoothedTower:
    """Return the tower with its channels smoothed by what a few drawn images show.

    The graphs in float32 that show it stay in the new folder `scratch`.
    """
    readers = readers_of(config)
    norms = frozenset(readers.values())
    write_graphs(scratch, config, tower, projector, cpu_options(FP16, norms), lambda *_: None)
    calibration = _tiles(config, drawn_scenes.SCENES[:CALIBRATION_IMAGES])
    _, extents = run_tiles(scratch, calibration, norms)
    return SmoothedTower(tower, smoothing_factors(tower, readers, extents), readers)


def cpu_options(dtype: str, extents: frozenset[str] = frozenset()) -> VisionGraphOptions:
    return VisionGraphOptions(OPSET, half=False, int8=dtype == INT8, cpu=True, extents=extents)


def write_graphs(
    folder: Path,
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    options: VisionGraphOptions,
    advance: Advance,
) -> None:
    """One graph from pixels to embeddings; two where features of several scales are joined."""
    folder.mkdir()
    with WeightFile(folder / files.WEIGHTS) as file:
        whole = None if config.tiling.uses_s2 else projector
        graph = build_vision_graph(config, tower, whole, file, advance, options)
        graph.save(folder / files.GRAPH)
    if config.tiling.uses_s2:
        with WeightFile(folder / files.PROJECTOR_WEIGHTS) as file:
            graph = build_projector_graph(config, projector, file, advance, options)
        graph.save(folder / files.PROJECTOR_GRAPH)


def held_out_tiles(config: VilaConfig) -> list[Floats]:
    """Return a tile [1, 3, size, size] of each drawn image that errors are measured on."""
    return _tiles(config, drawn_scenes_eval.SCENES[:HELD_OUT_IMAGES])


def _tiles(config: VilaConfig, scenes: Sequence[Scene]) -> list[Floats]:
    """Return the first tile [1, 3, size, size] of each scene."""
    images = [scene.image() for scene in scenes]
    pixels = preprocess(images, config.image, config.tiling, alone=False)
    return [each.tiles[:1] for each in pixels]


def run_tiles(
    folder: Path, tiles: Sequence[Floats], norms: frozenset[str] = frozenset()
) -> tuple[list[Floats], dict[str, torch.Tensor]]:
    """Return the features of each tile, and max|x| [channels] of each norm over all of them."""
    session = load_graph(folder / files.GRAPH, options=vision_options())
    names = sorted(norms)
    features: list[Floats] = []
    extents: dict[str, torch.Tensor] = {}
    for tile in tiles:
        found, *largest = session.run(["features", *map(extent_name, names)], {"pixels": tile})
        features.append(found)
        for name, values in zip(names, map(torch.from_numpy, largest), strict=True):
            extents[name] = torch.maximum(extents.get(name, values), values)
    return features, extents


def largest_error(found: Sequence[Floats], expected: Sequence[Floats]) -> float:
    """Return the largest relative norm of the difference between features of an image."""
    pairs = zip(found, expected, strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
