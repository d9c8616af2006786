"""Every vision tower against numbers of the original code, see the recipe in towers.json."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import vision_cases as cases
from tests.support.paths import GOLDEN
from tests.support.vision_cases import assert_sample
from vila_deploy.checkpoint.variants import TOWER_FAMILIES
from vila_deploy.checkpoint.vision_config import VisionConfig
from vila_deploy.model.towers import VisionTower

GOLDEN = json.loads((GOLDEN / "towers.json").read_text())
# Name there → (model_type, config, weights, layers that feed the selected state, key there)
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray], int, str]] = {
    "siglip": ("siglip_vision_model", cases.SIGLIP, cases.siglip_weights(), 2, "-2 cls_patch"),
    "siglip, last layer": (
        "siglip_vision_model",
        cases.SIGLIP,
        cases.siglip_weights(),
        3,
        "-1 cls_patch",
    ),
    "clip": ("clip_vision_model", cases.CLIP, cases.clip_weights(), 2, "-2 patch"),
    "intern": ("intern_vit_6b", cases.INTERN, cases.intern_weights(), 3, "-1 patch"),
    "intern_qkv_bias": (
        "intern_vit_6b",
        {**cases.INTERN, "qk_normalization": False, "qkv_bias": True},
        cases.intern_weights(False, True),
        3,
        "-1 patch",
    ),
}  # fmt: skip


class Weights:
    """A WeightSource over arrays."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def linear(self, prefix: str) -> Tensor:
        return self.tensor(f"{prefix}.weight")


def vision_config(model_type: str, values: dict[str, Any]) -> VisionConfig:
    internvit = model_type == "intern_vit_6b"
    return VisionConfig(
        family=TOWER_FAMILIES[model_type],
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        patch_size=values["patch_size"],
        image_size=values["image_size"],
        hidden_act=values["hidden_act"],
        layer_norm_eps=values["layer_norm_eps"],
        qkv_bias=values.get("qkv_bias", not internvit),
        qk_norm=values.get("qk_normalization", internvit),
    )


@pytest.mark.parametrize("row", ROWS)
def test_tower_equals_the_original(row: str) -> None:
    model_type, values, weights, layers, key = ROWS[row]
    tower = VisionTower(vision_config(model_type, values), layers, Weights(weights)).eval()
    with torch.inference_mode():
        found = tower(torch.from_numpy(cases.pixels((2, 3, 30, 30), 21)))
    assert_sample(found.numpy(), GOLDEN[row.partition(",")[0]][key])
