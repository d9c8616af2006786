"""Towers with channels of large values behind their norms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from vila_deploy.onnx_export.smoothing import SmoothedTower, readers_of


def with_outliers(checkpoint: Any) -> Any:
    """Return a checkpoint of the same function with some channels behind norms 200 times wider."""
    readers = readers_of(checkpoint.config)
    channels = checkpoint.config.vision.hidden_size
    factor = torch.ones(channels)
    factor[[3, 17]] = 1 / 200
    factors = {norm: factor for norm in readers.values()}
    return SimpleNamespace(
        config=checkpoint.config,
        vision=SmoothedTower(checkpoint.vision, factors, readers),
        projector=checkpoint.projector,
    )
