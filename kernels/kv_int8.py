"""Keys and values in int8: one float16 scale for each vector of a head, symmetric."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(127.0)
LEAST = tl.constexpr(2.0**-24)  # the least float16, so that zeros have a scale too


@triton.jit
def int8_scale(max_abs: tl.tensor) -> tl.tensor:
    """Return the float16 scale of vectors whose largest absolute value is `max_abs`, float32."""
    return tl.maximum(max_abs / LARGEST, LEAST).to(tl.float16)


@triton.jit
def quantize_int8(vectors: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return float16 vectors as int8, rounded to nearest; `scale` broadcasts to their shape."""
    nearest = tl.floor(vectors.to(tl.float32) * (1.0 / scale.to(tl.float32)) + 0.5)
    return tl.minimum(tl.maximum(nearest, -LARGEST), LARGEST).to(tl.int8)


@triton.jit
def dequantize_int8(quantized: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return the float16 vectors that attention takes."""
    return quantized.to(tl.float16) * scale


def quantize_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return float16 [..., dim] as the kernels store it: int8 [..., dim], float16 scales [...]."""
    wide = vectors.float()
    scale = (wide.abs().amax(-1) / LARGEST.value).clamp(min=LEAST.value).half()
    nearest = (wide * (1.0 / scale.float())[..., None] + 0.5).floor()
    return nearest.clamp(-LARGEST.value, LARGEST.value).to(torch.int8), scale


def dequantize_vectors(quantized: Tensor, scale: Tensor) -> Tensor:
    """Return the float16 vectors [..., dim] of int8 [..., dim] and scales [...], rounded once."""
    return quantized.half() * scale[..., None]
