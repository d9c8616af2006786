"""The protocol through which the model, graphs and kernels read weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from vila_deploy.formats.base import QuantizedLinear

if TYPE_CHECKING:
    from torch import Tensor


class WeightSource(Protocol):
    """The tensors of one part of a checkpoint, under their on-disk names."""

    def tensor(self, name: str) -> Tensor:
        """Return a floating-point tensor as stored, e.g. `model.norm.weight`."""
        ...

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        """Return the weight [out, in] of a linear layer, e.g. `model.layers.0.mlp.up_proj`."""
        ...


class ModelWeights(NamedTuple):
    """The tensors of a whole model, each read when it is asked for."""

    llm: WeightSource
    tower: WeightSource
    projector: WeightSource
