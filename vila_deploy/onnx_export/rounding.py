"""Round output heads and vision towers to int8 or int4 (RTN, no calibration)."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.formats.base import SYMMETRIC_ZERO, QuantizedLinear, QuantScheme
from vila_deploy.formats.int8_linear import LARGEST_INT8, ROWS, Int8Linear, round_int8
from vila_deploy.formats.module_dtypes import FP16, INT4, head_group_size
from vila_deploy.formats.rtn import LEAST_SCALE, round_to_nearest


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
