"""Round output heads and vision towers to int8 or int4 (RTN, no calibration)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.formats.base import SYMMETRIC_ZERO, QuantizedLinear, QuantScheme
from vila_deploy.formats.module_dtypes import FP16, INT4, head_group_size
from vila_deploy.formats.rtn import (
    LEAST_SCALE,
    check_scale,
    round_to_nearest,
    symmetric_scale,
)

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

    Raises:
        VilaDeployError: a weight is so large that its scale is no float16.
    """
    q, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for rows, out in zip(weight.split(ROWS), q.split(ROWS), strict=True):
        wide = rows.float()
        extent = wide.abs().amax(1)
        scale = symmetric_scale(extent, largest, largest * LEAST_SCALE).half()
        check_scale(scale, wide, name)
        out.copy_((wide / scale.float()[:, None]).round_().clamp_(-largest, largest))
        scales.append(scale)
    return Int8Linear(q, torch.cat(scales))


def round_int4(weight: Tensor, group_size: int, name: str) -> QuantizedLinear:
    """Round `weight` [out, in] to symmetric int4: scale = max|w| / 7 for each group of inputs.

    Raises:
        VilaDeployError: a weight is so large that its scale is no float16.
    """
    largest, scheme = SYMMETRIC_ZERO - 1, QuantScheme(group_size, symmetric=True)
    q, scales = torch.empty(weight.shape, dtype=torch.uint8), []
    for rows, out in zip(weight.split(ROWS), q.split(ROWS), strict=True):
        part = round_to_nearest(rows.float(), scheme, name, min_range=largest * LEAST_SCALE)
        # −8 becomes −7, which a tiny scale that was rounded down may need.
        out.copy_(part.q.clamp_(min=1))
        scales.append(part.scale)
    scale = torch.cat(scales)
    return QuantizedLinear(q, scale, torch.full_like(scale, SYMMETRIC_ZERO, dtype=torch.uint8))


def round_head(
    weight: Tensor, dtype: str, name: str, largest: int = LARGEST_INT8
) -> Tensor | Int8Linear | QuantizedLinear:
    """Round the head's `weight` [vocabulary, hidden] to `dtype`; fp16 returns it as it is.

    Args:
        largest: largest int8 value.
    """
    if dtype == FP16:
        return weight
    if dtype == INT4:
        return round_int4(weight, head_group_size(weight.shape[1]), name)
    return round_int8(weight, name, largest)
