"""Blocks of quantized values as GGUF stores them: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q6_K.

With d and m in float16, a block of 32 is w = d·(q − 8) in Q4_0, w = d·(q − 16) in Q5_0,
w = d·q + m in Q4_1 and Q5_1, and w = d·q in Q8_0; Q6_K has 256 values w = d·s·(q − 32) with an
int8 scale s for each 16 of them. Source: ggml-common.h and ggml-quants.c of
github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vila_deploy.formats.gguf_file import TENSOR_TYPES

ROWS_AT_A_TIME = 1024
BLOCK, HALF = 32, 16
SUPER_BLOCK, SUB_BLOCK = 256, 16
# Candidates around the scale that maps a sub-block's extreme to −32 (make_qx_quants).
STEPS = tuple(step for step in range(-9, 10) if step)


def four_bit_blocks(q: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """Return blocks [rows, columns/32, 20 or 18] in bytes: Q4_1, or Q4_0 without `minimum`.

    Args:
        q: uint8 [rows, columns], 0..15.
        scale: float16 [rows, columns/group], for a group of any multiple of 32.
        minimum: float16, like `scale`.
    """
    values = q.unflatten(1, (-1, BLOCK))
    repeats = values.shape[1] // scale.shape[1]
    parts = [scale] if minimum is None else [scale, minimum]
    heads = [_bytes_of(part.repeat_interleave(repeats, 1)) for part in parts]
    nibbles = values[..., :HALF] | values[..., HALF:] << 4
    return torch.cat([*heads, nibbles], -1)


def five_bit_blocks(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return blocks [rows, columns/32, 22] in bytes: Q5_0, which holds scale · (q − zero) exactly.

    Args:
        q: uint8 [rows, columns], 0..15.
        scale: float16 [rows, columns/group], for a group of any multiple of 32.
        zero: uint8, 0..15, like `scale`.
    """
    values = q.unflatten(1, (-1, BLOCK))
    repeats = values.shape[1] // scale.shape[1]
    values = values + 16 - zero.repeat_interleave(repeats, 1).unsqueeze(-1)
    head = _bytes_of(scale.repeat_interleave(repeats, 1))
    return torch.cat([head, _five_bits(values)], -1)


def five_bit_blocks_with_minimum(q: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Return blocks [rows, columns/32, 24] in bytes: Q5_1.

    Args:
        q: uint8 [rows, columns], 0..31.
        scale, minimum: float16 [rows, columns/group], for a group of any multiple of 32.
    """
    values = q.unflatten(1, (-1, BLOCK))
    repeats = values.shape[1] // scale.shape[1]
    heads = [_bytes_of(part.repeat_interleave(repeats, 1)) for part in (scale, minimum)]
    return torch.cat([*heads, _five_bits(values)], -1)


def eight_bit_blocks(q: Tensor, scale: Tensor) -> Tensor:
    """Return blocks [rows, columns/32, 34] in bytes: Q8_0.

    Args:
        q: uint8 [rows, columns], 0..255 with zero point 128.
        scale: float16 [rows, columns/group], for a group of any multiple of 32.
    """
    values = q.unflatten(1, (-1, BLOCK)) ^ 128
    repeats = values.shape[1] // scale.shape[1]
    return torch.cat([_bytes_of(scale.repeat_interleave(repeats, 1)), values], -1)


def _five_bits(values: Tensor) -> Tensor:
    """Return 0..31 [rows, blocks, 32] as fifth bits, then nibbles, in bytes [rows, blocks, 20]."""
    bits = (values >> 4).unflatten(2, (-1, 8)) << torch.arange(8, dtype=torch.uint8)
    nibbles = (values & 15)[..., :HALF] | (values & 15)[..., HALF:] << 4
    return torch.cat([bits.sum(-1).to(torch.uint8), nibbles], -1)


def read_blocks(blocks: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q, scale and minimum as they were written; a group's blocks must agree.

    Raises:
        ValueError: blocks of one group have different scales.
    """
    with_minimum = {4: "Q4_1", 5: "Q5_1"}.get(bits)
    has_minimum = bool(with_minimum) and (
        blocks.shape[-1] == TENSOR_TYPES[with_minimum or ""].block_bytes
    )
    heads = blocks[..., : 4 if has_minimum else 2].contiguous().view(torch.float16)
    grouped = heads.unflatten(1, (-1, group_size // BLOCK))
    first = grouped[:, :, :1]
    if not torch.equal(
        grouped.view(torch.int16), first.expand_as(grouped).contiguous().view(torch.int16)
    ):
        raise ValueError(f"has scales that differ within groups of {group_size}")
    if bits == 8:
        q = (blocks[..., -BLOCK:] ^ 128).flatten(1)
    else:
        nibbles = blocks[..., -HALF:]
        values = torch.cat([nibbles & 15, nibbles >> 4], -1)
        if bits == 5:
            fifth = blocks[..., -HALF - 4 : -HALF].unsqueeze(-1)
            fifth = fifth >> torch.arange(8, dtype=torch.uint8) & 1
            values = values | fifth.flatten(2) << 4
        q = values.flatten(1)
    scale = first[:, :, 0, 0].contiguous()
    return q, scale, first[:, :, 0, 1].contiguous() if has_minimum else None


def quantize_table(table: Tensor, dtype: str) -> Iterator[Tensor]:
    """Yield `table` [rows, columns] in blocks of `dtype`, Q8_0 or Q6_K, as bytes [some rows, …].

    Bit for bit what ggml's reference quantization gives for Q8_0.
    """
    encode = {"Q8_0": _to_q8_0, "Q6_K": _to_q6_k}[dtype]
    for rows in table.split(ROWS_AT_A_TIME):
        yield encode(rows.float()).flatten(1)


def dequantize_table(content: Tensor, dtype: str) -> Tensor:
    """Return float32 [rows, columns] of bytes [rows, …] in blocks of Q8_0 or Q6_K."""
    blocks = content.unflatten(1, (-1, TENSOR_TYPES[dtype].block_bytes))
    return {"Q8_0": _from_q8_0, "Q6_K": _from_q6_k}[dtype](blocks).flatten(1)


def _to_q8_0(rows: Tensor) -> Tensor:
    blocks = rows.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, scale, 1 / scale)
    scaled = blocks * inverse
    # C's roundf: halves away from zero.
    q = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled))
    return torch.cat([_bytes_of(scale.squeeze(-1).half()), q.to(torch.int8).view(torch.uint8)], -1)


def _from_q8_0(blocks: Tensor) -> Tensor:
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return blocks[..., 2:].contiguous().view(torch.int8).float() * scale


def _to_q6_k(rows: Tensor) -> Tensor:
    sub_blocks = rows.unflatten(1, (-1, SUPER_BLOCK // SUB_BLOCK, SUB_BLOCK))
    scales = _sub_block_scales(sub_blocks)
    extreme = _extreme(scales)
    inverse = torch.where(extreme == 0, extreme, -128 / extreme)
    factor = torch.where(inverse == 0, inverse, 1 / inverse).half()
    steps = (inverse * scales).round().clamp(-128, 127)
    step = factor.float() * steps
    q = (sub_blocks / step.unsqueeze(-1)).nan_to_num(0, 0, 0).round().clamp(-32, 31) + 32
    # [rows, super-blocks, halves of 128, quarters, 32]
    quarters = q.to(torch.uint8).flatten(2).unflatten(2, (2, 4, 32))
    low, high = quarters & 15, quarters >> 4
    packed_low = (low[..., :2, :] | low[..., 2:, :] << 4).flatten(2)
    packed_high = high[..., 0, :].clone()
    for index in range(1, 4):
        packed_high |= high[..., index, :] << (2 * index)
    return torch.cat(
        [packed_low, packed_high.flatten(2), steps.to(torch.int8).view(torch.uint8),
         _bytes_of(factor.squeeze(-1))], -1,
    )  # fmt: skip


def _from_q6_k(blocks: Tensor) -> Tensor:
    low, high, steps, factor = blocks.split([128, 64, 16, 2], -1)
    low, high = low.unflatten(2, (2, 2, 32)), high.unflatten(2, (2, 32))
    nibbles = torch.cat([low & 15, low >> 4], 3)
    pairs = torch.stack([high >> (2 * index) & 3 for index in range(4)], 3)
    q = (nibbles | pairs << 4).float().flatten(2).unflatten(2, (-1, SUB_BLOCK)) - 32
    scale = factor.contiguous().view(torch.float16).float()
    return (q * (scale * steps.contiguous().view(torch.int8).float()).unsqueeze(-1)).flatten(2)


def _sub_block_scales(x: Tensor) -> Tensor:
    """Return the scale of each sub-block with the least error weighted by x², [.., sub-blocks].

    Of 19 roundings of the values, each with its own least-squares scale.
    """
    extreme, weight = _extreme(x), x * x

    def fit(steps: float) -> tuple[Tensor, Tensor]:
        inverse = torch.where(extreme == 0, extreme, -steps / extreme)
        q = (x * inverse).round().clamp(-32, 31)
        return (weight * x * q).sum(-1), (weight * q * q).sum(-1)

    products, squares = fit(32)
    scale = (products / squares).nan_to_num(0, 0, 0)
    best = scale * products
    for step in STEPS:
        products, squares = fit(32 + 0.1 * step)
        better = (squares > 0) & (products * products > best * squares)
        scale = torch.where(better, products / squares, scale)
        best = torch.where(better, scale * products, best)
    return scale


def _extreme(x: Tensor) -> Tensor:
    """Return the value of largest magnitude along the last axis, which stays with size 1."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _bytes_of(half: Tensor) -> Tensor:
    """Return float16 [...] as bytes [..., 2]."""
    return half.contiguous().unsqueeze(-1).view(torch.uint8)
