"""Small random checkpoints of the first generation: one folder, which only names its tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import PREPROCESSORS, TOWERS, flatten, make_checkpoint
from vila_deploy.checkpoint.variants import KNOWN_TOWERS

CLIP, IMAGE = "openai/clip-vit-large-patch14-336", 70
FIELDS: dict[str, Any] = {
    "tower": "clip", "image": IMAGE, "projector": "mlp2x_gelu",
    "root_config": {"image_aspect_ratio": "pad"},
}  # fmt: skip


def shrink_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tower that checkpoints name as small as theirs is."""
    tower: dict[str, Any] = {
        **TOWERS["clip"], "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 128, "patch_size": 14, "image_size": IMAGE,
    }  # fmt: skip
    monkeypatch.setitem(KNOWN_TOWERS, CLIP, (tower, PREPROCESSORS["clip"](IMAGE)))


def make_first_generation(root: Path) -> Path:
    """Write a checkpoint; it is read where `shrink_clip` is in force."""
    return flatten(make_checkpoint(root, **FIELDS), CLIP)
