"""The in-memory form of a 4-bit linear: every on-disk format packs from it and unpacks to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 4
MAX_LEVEL = 2**BITS - 1  # 15
SYMMETRIC_ZERO = 2 ** (BITS - 1)  # 8


@dataclass(frozen=True)
class QuantizedLinear:
    """W ≈ (q − zero) · scale per group of input channels; y = (x · prequant_scale) Wᵀ + bias.

    Args:
        q: uint8 [out, in], values 0..15.
        scale: float16 [out, in/group].
        zero: uint8 [out, in/group], values 0..15; 8 everywhere means symmetric.
        bias: float16 [out] or None.
        prequant_scale: float16 [in] or None.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None = None
    prequant_scale: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.q.dtype == self.zero.dtype == torch.uint8
        assert self.scale.dtype == torch.float16
        assert self.scale.shape == self.zero.shape
        assert self.q.shape[1] % self.scale.shape[1] == 0

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    @property
    def symmetric(self) -> bool:
        return bool((self.zero == SYMMETRIC_ZERO).all())

    def cpu(self) -> QuantizedLinear:
        """The same in host memory."""
        bias, prequant = (
            None if part is None else part.cpu() for part in (self.bias, self.prequant_scale)
        )
        return QuantizedLinear(self.q.cpu(), self.scale.cpu(), self.zero.cpu(), bias, prequant)

    def dequantize(self) -> Tensor:
        """The effective weight, float32 [out, in]; exact: 5 bits times 11 bits fit into 24."""
        groups = (
            self.q.unflatten(1, (-1, self.group_size)).float() - self.zero.unsqueeze(-1).float()
        )
        weight = (groups * self.scale.unsqueeze(-1).float()).flatten(1)
        return weight if self.prequant_scale is None else weight * self.prequant_scale.float()
