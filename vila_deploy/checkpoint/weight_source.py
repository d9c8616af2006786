"""Where weights come from, as the reference model and the graph builder see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from vila_deploy.formats.base import QuantizedLinear


class WeightSource(Protocol):
    """The tensors of one part of a checkpoint, under their on-disk names."""

    def tensor(self, name: str) -> Tensor:
        """A floating-point tensor as stored, e.g. `model.norm.weight`."""
        ...

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        """The weight [out, in] of a linear layer, e.g. `model.layers.0.mlp.up_proj`."""
        ...
