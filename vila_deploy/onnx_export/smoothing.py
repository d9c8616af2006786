"""Move outlier channels of a vision tower from activations into weights (SmoothQuant).

A norm's output x and the weight W that reads it are replaced by x / f and W · diag(f), which
changes nothing in exact arithmetic (Xiao et al., "SmoothQuant", 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.base import QuantizedLinear

# Norms of a layer, and the linears that read their outputs.
READERS: Mapping[str, tuple[str, ...]] = {
    "layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "layer_norm2": ("mlp.fc1",),
}
INTERNVIT_READERS: Mapping[str, tuple[str, ...]] = {"norm1": ("attn.qkv",), "norm2": ("mlp.fc1",)}
LEAST = 1e-5


@dataclass(frozen=True)
class SmoothedTower:
    """A tower's WeightSource with smoothing folded into norms and weights.

    Args:
        factors: f [channels] by the name of a norm, e.g.
            "vision_model.encoder.layers.0.layer_norm1"; norms that are not in it stay as they are.
        readers: the norm that each linear's input comes from, by the linear's name.
    """

    source: WeightSource
    factors: Mapping[str, Tensor]
    readers: Mapping[str, str]

    def tensor(self, name: str) -> Tensor:
        module = name.rpartition(".")[0]
        tensor = self.source.tensor(name)
        if module in self.factors:
            return tensor.float() / self.factors[module]
        norm = self.readers.get(module, "")
        if norm in self.factors and name.endswith(".weight"):
            return tensor.float() * self.factors[norm]
        return tensor

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        return self.tensor(f"{prefix}.weight")


def readers_of(config: VilaConfig) -> dict[str, str]:
    """Return the norm of each linear of the tower that reads one, both by name."""
    family = config.vision.family
    by_norm = INTERNVIT_READERS if family.name == "internvit" else READERS
    return {
        f"{family.prefix}encoder.layers.{layer}.{linear}": (
            f"{family.prefix}encoder.layers.{layer}.{norm}"
        )
        for layer in range(config.vision_layers_used)
        for norm, linears in by_norm.items()
        for linear in linears
    }


def smoothing_factors(
    tower: WeightSource, readers: Mapping[str, str], extents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return f = sqrt(max|x| / max|w|) for each channel of each norm, their geometric mean 1.

    Args:
        extents: max|x| [channels] behind each norm, over calibration data.
    """
    factors = {}
    for norm, extent in extents.items():
        linears = [linear for linear, name in readers.items() if name == norm]
        columns = [tower.tensor(f"{linear}.weight").float().abs().amax(0) for linear in linears]
        ratio = extent.clamp(min=LEAST) / torch.stack(columns).amax(0).clamp(min=LEAST)
        factor = ratio.sqrt()
        factors[norm] = factor / factor.log().mean().exp()
    return factors
