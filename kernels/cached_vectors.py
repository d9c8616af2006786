"""Device functions that read, rotate and append vectors of a key/value cache."""

from __future__ import annotations

import triton
import triton.language as tl

from vila_deploy.kernels.kv_int8 import dequantize_int8, int8_scale, quantize_int8


@triton.jit
def append_token(
    source_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, newest: tl.tensor,
    kv_heads: tl.tensor, dim: tl.tensor, in_dim: tl.tensor,
    INT8: tl.constexpr, DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Write the new token's key, rotated, and value to its position."""
    key = rotate(source_ptr, dim, cos_ptr, sin_ptr, newest, in_dim, DIM)
    value = tl.load(source_ptr + kv_heads * DIM + dim, mask=in_dim, other=0.0)
    append_vector(key, keys_ptr, key_scales_ptr, newest, dim, in_dim, INT8, DIM)
    append_vector(value, values_ptr, value_scales_ptr, newest, dim, in_dim, INT8, DIM)


@triton.jit
def append_vector(
    vector: tl.tensor, cache_ptr: tl.tensor, scales_ptr: tl.tensor, newest: tl.tensor,
    dim: tl.tensor, in_dim: tl.tensor, INT8: tl.constexpr, DIM: tl.constexpr,
) -> None:  # fmt: skip
    """Write the new token's vector to its position."""
    if INT8:
        scale = int8_scale(tl.max(tl.abs(vector.to(tl.float32)), 0))
        vector = quantize_int8(vector, scale)
        tl.store(scales_ptr + newest, scale)
    tl.store(cache_ptr + newest * DIM + dim, vector, mask=in_dim)


@triton.jit
def load_vectors(
    cells_ptr: tl.tensor, scales_ptr: tl.tensor, filled: tl.tensor, in_dim: tl.tensor,
    INT8: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return float16 vectors of the cache; zeros at positions that aren't `filled`."""
    vectors = tl.load(cells_ptr, mask=filled & in_dim, other=0)
    if INT8:
        vectors = dequantize_int8(vectors, tl.load(scales_ptr, mask=filled, other=0.0))
    return vectors


@triton.jit
def rotate(
    source_ptr: tl.tensor, dim: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    position: tl.tensor, inside: tl.tensor, DIM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return float16 vectors at `source_ptr` after rotary embedding at `position`."""
    HALF: tl.constexpr = DIM // 2
    partner_dim = tl.where(dim < HALF, dim + HALF, dim - HALF)
    value = tl.load(source_ptr + dim, mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(source_ptr + partner_dim, mask=inside, other=0.0).to(tl.float32)
    angle = position * HALF + dim % HALF
    c = tl.load(cos_ptr + angle, mask=dim < DIM, other=0.0)
    s = tl.load(sin_ptr + angle, mask=dim < DIM, other=0.0)
    return (value * c + tl.where(dim < HALF, -partner, partner) * s).to(tl.float16)
