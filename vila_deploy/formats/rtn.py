"""Round to nearest: weights to 4-bit levels, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.formats.base import MAX_LEVEL, SYMMETRIC_ZERO, QuantizedLinear
from vila_deploy.formats.scheme import QuantScheme
from vila_deploy.utils.errors import VilaDeployError

# llm-awq's floor on a group's range, which keeps the scale of an all-zero group above zero.
MIN_RANGE = 1e-5


def to_float16(tensor: Tensor, name: str) -> Tensor:
    """`tensor` as float16, the type of every unquantized tensor in an AWQ checkpoint.

    Raises:
        VilaDeployError: a value is too large for it.
    """
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise VilaDeployError(
            f"a value of {float(tensor.abs().max()):.3g} is too large for float16",
            where=name,
            fix="check that this checkpoint is not damaged",
        )
    return half


def group_levels(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scales and zero points of float32 `weight` [out, in], as llm-awq has them.

    Asymmetric: scale = (max − min) / 15, zero = round(−min / scale) in 0..15, and
    q = clamp(round(w / scale) + zero, 0, 15). The range always contains 0, so that a group of one
    sign isn't cut off. Symmetric: scale = max|w| / 7, zero = 8. The levels are computed with the
    scale as it is stored, in `scale_dtype`.

    Returns:
        q float32 [out, in/group, group], scale float32 and zero float32 [out, in/group, 1].
    """
    return range_levels(weight.unflatten(1, (-1, scheme.group_size)), scheme, 1.0, scale_dtype)


def range_levels(
    groups: Tensor,
    scheme: QuantScheme,
    factor: float,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for `groups` [out, in/group, group] whose ranges are taken times `factor`."""
    if scheme.symmetric:
        extent = groups.abs().amax(-1, keepdim=True) * factor
        scale = extent.clamp(min=MIN_RANGE) / (SYMMETRIC_ZERO - 1)
        scale = scale.to(scale_dtype).float()
        zero = torch.full_like(scale, SYMMETRIC_ZERO)
    else:
        low = groups.amin(-1, keepdim=True).clamp(max=0) * factor
        high = groups.amax(-1, keepdim=True).clamp(min=0) * factor
        scale = ((high - low).clamp(min=MIN_RANGE) / MAX_LEVEL).to(scale_dtype).float()
        zero = torch.round(-low / scale).clamp(0, MAX_LEVEL)
    q = (torch.round(groups / scale) + zero).clamp(0, MAX_LEVEL)
    return q, scale, zero


def fake_quantize(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype = torch.float16
) -> Tensor:
    """`weight` [out, in] as it comes back after quantizing: what the search optimises."""
    q, scale, zero = group_levels(weight, scheme, scale_dtype)
    return ((q - zero) * scale).flatten(1)


def round_to_nearest(
    weight: Tensor, scheme: QuantScheme, name: str = "weight", bias: Tensor | None = None
) -> QuantizedLinear:
    """Quantizes float32 `weight` [out, in]; its `bias` [out] stays float16.

    Raises:
        VilaDeployError: a group's range is too large for a float16 scale, or the bias for float16.
    """
    q, scale, zero = group_levels(weight, scheme)
    if not bool(torch.isfinite(scale).all()):
        raise VilaDeployError(
            f"weights up to {float(weight.abs().max()):.3g} need a scale beyond float16",
            where=name,
            fix="check that this checkpoint is not damaged",
        )
    return QuantizedLinear(
        q=q.flatten(1).to(torch.uint8),
        scale=scale.squeeze(-1).to(torch.float16),
        zero=zero.squeeze(-1).to(torch.uint8),
        bias=None if bias is None else to_float16(bias, f"{name}.bias"),
    )
