"""Towers that engines for GPUs store in int8: smoothed when they are built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.outliers import with_outliers
from tests.support.paths import TINY_VILA
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native.tower import load_encoder, tower_tensors
from vila_deploy.builder import smoothed_tower as smoothed_tower_module
from vila_deploy.builder.smoothed_tower import smoothed_tower
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.data.drawn_scenes_eval import SCENES
from vila_deploy.processing.images import preprocess


def image_embeddings(checkpoint: Any, tower: WeightSource, dtype: str) -> np.ndarray:
    """Return the embeddings of held-out drawn images by a native engine's encoder."""
    config, projector = checkpoint.config, checkpoint.projector
    encoder = load_encoder(
        dict(tower_tensors(config, tower, projector, dtype)), config, torch.float32
    )
    images = [scene.image() for scene in SCENES[:2]]
    pixels = preprocess(images, config.image, config.tiling, alone=False)
    with torch.inference_mode():
        found = [encoder(torch.from_numpy(each.tiles[:1])).numpy() for each in pixels]
    return np.stack(found)


@pytest.mark.parametrize("kind", ["siglip", "clip", "internvit", "tiny-vila"])
def test_outlier_channels_cost_at_most_half(tmp_path: Path, kind: str) -> None:
    folder = TINY_VILA if kind == "tiny-vila" else make_checkpoint(tmp_path / "c", tower=kind)
    checkpoint = with_outliers(open_checkpoint(folder))
    tower = checkpoint.vision
    smoothed = smoothed_tower(checkpoint.config, tower, checkpoint.projector, tmp_path)
    assert not list(tmp_path.glob(".smoothing-*"))
    expected = image_embeddings(checkpoint, tower, "fp16")
    plain, found = (
        np.linalg.norm(image_embeddings(checkpoint, source, "int8") - expected)
        for source in (tower, smoothed)
    )
    assert found <= plain / 2


def test_a_tower_that_smoothing_would_not_help_stays_as_it_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY_VILA)
    parts = checkpoint.config, checkpoint.vision, checkpoint.projector
    assert smoothed_tower(*parts, tmp_path) is checkpoint.vision


def test_without_memory_or_in_int8_already_it_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    config, tower, projector = checkpoint.config, checkpoint.vision, checkpoint.projector
    vision = replace(config.vision, int8_linears=("vision_model.encoder.layers.0.mlp.fc1",))
    stored = replace(config, vision=vision)
    assert smoothed_tower(stored, tower, projector, tmp_path) is tower
    monkeypatch.setattr(smoothed_tower_module, "available_memory_bytes", lambda: 1)
    assert smoothed_tower(config, tower, projector, tmp_path) is tower
