"""Smooth a vision tower whose weights an engine for a GPU stores in int8, where that pays."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.memory import float_tower_bytes
from vila_deploy.backends.onnxruntime.vision import (
    cpu_options,
    held_out_tiles,
    largest_error,
    run_tiles,
    smooth_tower,
    write_graphs,
)
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.int8_linear import round_int8
from vila_deploy.formats.module_dtypes import FP16, is_tower_linear
from vila_deploy.utils.estimates import available_memory_bytes


def smoothed_tower(
    config: VilaConfig, tower: WeightSource, projector: WeightSource, folder: Path
) -> WeightSource:
    """Return the tower with channels of large values moved into the weights that read them.

    It stays as it is if its features of held-out drawn images are closer to float32's so, if it is
    in int8 already, or where there is too little memory to run it in float32.

    Args:
        folder: gets a temporary folder for these runs.
    """
    if config.vision.int8_linears or available_memory_bytes() < float_tower_bytes(config):
        return tower
    images = held_out_tiles(config)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".smoothing-") as name:
        plain = Path(name, "plain")
        smoothed = smooth_tower(plain, config, tower, projector)
        expected, _ = run_tiles(plain, images)
        errors = []
        for number, candidate in enumerate((tower, smoothed)):
            rounded = Path(name, f"rounded-{number}")
            weights = _Int8Tower(candidate), projector
            write_graphs(rounded, config, *weights, cpu_options(FP16), lambda *_: None)
            found, _ = run_tiles(rounded, images)
            errors.append(largest_error(found, expected))
            (rounded / files.WEIGHTS).unlink()
    return smoothed if errors[1] < errors[0] else tower


@dataclass(frozen=True)
class _Int8Tower:
    """A tower's WeightSource with the weights that int8 rounds, rounded."""

    source: WeightSource

    def tensor(self, name: str) -> Tensor:
        tensor = self.source.tensor(name)
        if not is_tower_linear(name, tuple(tensor.shape)):
            return tensor
        return round_int8(tensor, name).dequantize()

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        return self.tensor(f"{prefix}.weight")
