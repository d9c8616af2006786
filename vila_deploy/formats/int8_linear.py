"""A linear in int8 with a scale for each output: vision towers, and output heads on GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.formats.rtn import LEAST_SCALE, check_scale, symmetric_scale

# Rows of a matrix that are float32 in memory at a time.
ROWS = 4096
LARGEST_INT8 = 127


@dataclass(frozen=True)
class Int8Linear:
    """W ≈ q · scale: q int8 [out, in], scale float16 [out]."""

    q: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        assert self.q.dtype == torch.int8
        assert self.scale.dtype == torch.float16
        assert self.scale.shape == self.q.shape[:1]

    def dequantize(self) -> Tensor:
        """Return the effective weight, float32 [out, in]."""
        return self.q.float() * self.scale.float()[:, None]


def round_int8(weight: Tensor, name: str, largest: int = LARGEST_INT8) -> Int8Linear:
    """Round `weight` [out, in] to int8: scale = max|w| / largest for each output.

    What has been rounded so keeps its values and scales when it is rounded again.

    Raises:
        VilaDeployError: a weight is so large that its scale is no float16.
    """
    q, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for rows, out in zip(weight.split(ROWS), q.split(ROWS), strict=True):
        wide = rows.float()
        scale = int8_scale(wide, largest)
        check_scale(scale, wide, name)
        out.copy_((wide / scale.float()[:, None]).round_().clamp_(-largest, largest))
        scales.append(scale)
    return Int8Linear(q, torch.cat(scales))


def int8_scale(weight: Tensor, largest: int = LARGEST_INT8) -> Tensor:
    """Return the scale of each output, float16 [out], of float32 `weight` [out, in]."""
    return symmetric_scale(weight.abs().amax(1), largest, largest * LEAST_SCALE).half()
