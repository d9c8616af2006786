"""RTN: each weight rounded to the nearest quantized value, group by group."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.formats.base import QuantizedLinear, QuantScheme, to_float16
from vila_deploy.utils.errors import VilaDeployError

# Floors on a group's range, which keep the scale of an all-zero group above zero: llm-awq's, and
# the smallest that gives a float16 scale, times the largest quantized value.
MIN_RANGE = 1e-5
LEAST_SCALE = 2.0**-24
TABLE_ROWS = 4096


def quantize_groups(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype = torch.float16,
    min_range: float = MIN_RANGE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return quantized values, scales and zero points of float32 `weight` [out, in].

    As llm-awq has them. Asymmetric: scale = (max − min) / 15, zero = round(−min / scale) in 0..15,
    and q = clamp(round(w / scale) + zero, 0, 15). The range always contains 0, so that a group of
    one sign isn't cut off. Symmetric: scale = max|w| / 7, zero = 8. q is computed with the scale as
    it is stored, in `scale_dtype`. 15, 7 and 8 are those of 4 bits.

    Returns:
        q float32 [out, in/group, group], scale float32 and zero float32 [out, in/group, 1].
    """
    groups = weight.unflatten(1, (-1, scheme.group_size))
    return quantize_clipped(groups, scheme, 1.0, scale_dtype, min_range)


def quantize_clipped(
    groups: Tensor,
    scheme: QuantScheme,
    ratio: float,
    scale_dtype: torch.dtype = torch.float16,
    min_range: float = MIN_RANGE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same of `groups` [out, in/group, group] whose ranges are clipped by `ratio`."""
    if scheme.symmetric:
        extent = groups.abs().amax(-1, keepdim=True) * ratio
        scale = (
            symmetric_scale(extent, scheme.symmetric_zero - 1, min_range).to(scale_dtype).float()
        )
        zero = torch.full_like(scale, scheme.symmetric_zero)
    else:
        low = groups.amin(-1, keepdim=True).clamp(max=0) * ratio
        high = groups.amax(-1, keepdim=True).clamp(min=0) * ratio
        scale = (high - low).clamp(min=min_range) / scheme.max_value
        scale = scale.to(scale_dtype).float()
        zero = torch.round(-low / scale).clamp(0, scheme.max_value)
    q = (torch.round(groups / scale) + zero).clamp(0, scheme.max_value)
    return q, scale, zero


def symmetric_scale(extent: Tensor, largest: int, min_range: float) -> Tensor:
    """Return the scale with which `extent`, the largest |w| of each group, becomes `largest`."""
    return extent.clamp(min=min_range) / largest


def check_scale(scale: Tensor, weight: Tensor, name: str) -> None:
    """Raise VilaDeployError if the float16 `scale` of `weight` overflowed."""
    if not bool(scale.isfinite().all()):
        raise VilaDeployError(
            f"weights up to {float(weight.abs().max()):.3g} need a scale beyond float16",
            where=name,
            fix="check that this checkpoint is not damaged",
        )


def fake_quantize(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype = torch.float16
) -> Tensor:
    """Return `weight` [out, in] as it is after quantizing: what the scale search optimises."""
    q, scale, zero = quantize_groups(weight, scheme, scale_dtype)
    return ((q - zero) * scale).flatten(1)


def round_to_nearest(
    weight: Tensor,
    scheme: QuantScheme,
    name: str = "weight",
    bias: Tensor | None = None,
    min_range: float = MIN_RANGE,
) -> QuantizedLinear:
    """Quantize float32 `weight` [out, in]; its `bias` [out] stays float16.

    Raises:
        VilaDeployError: a group's range is too large for a float16 scale, or the bias for float16.
    """
    q, scale, zero = quantize_groups(weight, scheme, min_range=min_range)
    check_scale(scale, weight, name)
    return QuantizedLinear(
        q=q.flatten(1).to(torch.uint8),
        scale=scale.squeeze(-1).to(torch.float16),
        zero=zero.squeeze(-1).to(torch.uint8),
        bias=None if bias is None else to_float16(bias, f"{name}.bias"),
        bits=scheme.bits,
    )


def round_table(weight: Tensor, scheme: QuantScheme, name: str) -> QuantizedLinear:
    """Quantize `weight` [out, in] of any dtype and many rows, a part in float32 at a time.

    Raises:
        VilaDeployError: a group's range is too large for a float16 scale.
    """
    parts = [round_to_nearest(rows.float(), scheme, name) for rows in weight.split(TABLE_ROWS)]
    return QuantizedLinear(
        q=torch.cat([part.q for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat([part.zero for part in parts]),
        bits=scheme.bits,
    )
