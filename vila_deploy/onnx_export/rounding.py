"""Round output heads and vision towers to int8 or int4 (RTN, no calibration)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.formats.base import SYMMETRIC_ZERO, QuantizedLinear
from vila_deploy.formats.module_dtypes import FP16, INT4, head_group_size
from vila_deploy.utils.errors import VilaDeployError

# Rows of a matrix that are float32 in memory at a time.
ROWS = 4096
LARGEST_INT8 = 127
# Keeps the scale of a row or group of zeros above zero.
LEAST_SCALE = 2.0**-24


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
    q, scale = torch.empty(weight.shape, dtype=torch.int8), []
    for rows, out in zip(weight.split(ROWS), q.split(ROWS), strict=True):
        wide = rows.float()
        step = _scale(wide.abs().amax(1), largest, name)
        out.copy_((wide / step.float()[:, None]).round_().clamp_(-largest, largest))
        scale.append(step)
    return Int8Linear(q, torch.cat(scale))


def round_int4(weight: Tensor, group_size: int, name: str) -> QuantizedLinear:
    """Round `weight` [out, in] to symmetric int4: scale = max|w| / 7 for each group of inputs.

    Raises:
        VilaDeployError: a weight is so large that its scale is no float16.
    """
    q, scales = torch.empty(weight.shape, dtype=torch.uint8), []
    largest = SYMMETRIC_ZERO - 1
    for rows, out in zip(weight.split(ROWS), q.split(ROWS), strict=True):
        groups = rows.float().unflatten(1, (-1, group_size))
        step = _scale(groups.abs().amax(2), largest, name)
        values = (groups / step.float()[..., None]).round_().clamp_(-largest, largest)
        out.copy_((values + SYMMETRIC_ZERO).flatten(1))
        scales.append(step)
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


def _scale(extent: Tensor, largest: int, name: str) -> Tensor:
    scale = (extent / largest).clamp_(min=LEAST_SCALE).half()
    if not bool(torch.isfinite(scale).all()):
        raise VilaDeployError(
            f"a weight of {float(extent.max()):.3g} needs a scale beyond float16",
            where=name,
            fix="check that this checkpoint is not damaged",
        )
    return scale
