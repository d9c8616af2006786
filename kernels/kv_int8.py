"""Keys and values in 8 bits: one float16 scale for each vector of a head, symmetric levels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = tl.constexpr(127.0)
LEAST = tl.constexpr(2.0**-24)  # the least float16, so that zeros have a scale too


@triton.jit
def scale_of(largest):
    """float16 scale of vectors whose largest absolute value is `largest`, float32."""
    return tl.maximum(largest / LARGEST, LEAST).to(tl.float16)


@triton.jit
def levels_of(vectors, scale):
    """int8 levels of float16 vectors, the nearest; `scale` must have their shape but for 1s."""
    nearest = tl.floor(vectors.to(tl.float32) * (1.0 / scale.to(tl.float32)) + 0.5)
    return tl.minimum(tl.maximum(nearest, -LARGEST), LARGEST).to(tl.int8)


@triton.jit
def widened(levels, scale):
    """The float16 vectors that attention takes instead."""
    return levels.to(tl.float16) * scale


def round_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernels keep of float16 [..., dim]: int8 levels [..., dim], float16 scales [...]."""
    wide = vectors.float()
    scale = (wide.abs().amax(-1) / LARGEST.value).clamp(min=LEAST.value).half()
    nearest = (wide * (1.0 / scale.float())[..., None] + 0.5).floor()
    return nearest.clamp(-LARGEST.value, LARGEST.value).to(torch.int8), scale


def widen_vectors(levels: Tensor, scale: Tensor) -> Tensor:
    """The float16 vectors [..., dim] that levels and scales stand for, rounded once."""
    return levels.half() * scale[..., None]
