"""How weights lie in device memory, so that a program's loads are 16 bytes wide and in sequence.

A weight [out, in] is cut into tiles of ROWS output channels and blocks of `block` input channels,
and stored tile by tile, block by block: [tiles, blocks, ROWS, words]. A program owns whole tiles,
so it reads one unbroken range. Output channels are padded with zero rows to PAD_ROWS, input
channels with zero weights to whole blocks.

Within a block, word i of a row packs the quantized values of several lanes: lane j is input channel
i + j · words of the block. So lane j of a tile is a [ROWS, words] matrix of neighbouring input
channels: masking and one fused multiply-add turn two words at once into float16 weights, and no
activation is permuted.

bits  word     pack factor  block                       scale_zero
4     int16    4            64 (groups ≤ 64) or 128     one per group of a row
8     int16    2            128                         one per block of a row
16    float16  1            64                          none

`scale_zero` is int32 [tiles, groups, ROWS]: the float16 scale in the low half, and in the high half
−zero_point · 2⁻⁹ as float16, exact for zero points of 0..255. A quantized value q enters as the
float16 number whose bits it is, q · 2⁻²⁴, and q · 2⁻²⁴ · 2¹⁵ − zero_point · 2⁻⁹ =
(q − zero_point) · 2⁻⁹, exact as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.formats.base import QuantizedLinear

ROWS, PAD_ROWS = 16, 32
PACK_FACTOR = {4: 4, 8: 2, 16: 1}
ZERO_UNIT = 2.0**-9
INT8_ZERO_POINT, INT8_GROUP, FLOAT_BLOCK = 128, 128, 64


@dataclass(frozen=True)
class PackedLinear:
    """A weight [out_features, in_features] in the layout above.

    Args:
        words: int16 (4 and 8 bits) or float16 [tiles, blocks, ROWS, block / pack factor].
        scale_zero: int32 [tiles, groups, ROWS]; one element that nothing reads for 16 bits.
        group: input channels to a scale.
    """

    words: Tensor
    scale_zero: Tensor
    out_features: int
    in_features: int
    bits: int
    group: int

    @property
    def block(self) -> int:
        """Input channels of a block."""
        return self.words.shape[3] * PACK_FACTOR[self.bits]

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.words.shape[1]

    @property
    def size_bytes(self) -> int:
        """Bytes that one pass over the weight reads."""
        scales = self.scale_zero.numel() * 4 if self.bits < 16 else 0
        return self.words.numel() * 2 + scales


def block_size(bits: int, group: int) -> int:
    """Return the input channels of a block: lanes of whole groups, or groups of whole blocks."""
    if bits == 16:
        return FLOAT_BLOCK
    return 64 if group <= 64 else 128


def pack_int4(linear: QuantizedLinear) -> PackedLinear:
    """Return quantized values, scales and zero points packed; `prequant_scale` must be None."""
    assert linear.prequant_scale is None
    return _pack(linear.q, linear.scale, linear.zero, 4, linear.group_size)


def pack_int8(weight: Tensor) -> PackedLinear:
    """Return a float weight [out, in] in int8 (RTN), symmetric in groups of INT8_GROUP channels."""
    columns = weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % INT8_GROUP))
    groups = padded.unflatten(1, (-1, INT8_GROUP))
    scale = (groups.abs().amax(-1) / 127).clamp(min=2.0**-24).half()
    shifted = (groups / scale.float()[..., None]).round().clamp(-127, 127) + INT8_ZERO_POINT
    q = shifted.flatten(1)[:, :columns].to(torch.uint8)
    zero_point = torch.full(scale.shape, INT8_ZERO_POINT, dtype=torch.uint8, device=weight.device)
    return _pack(q, scale, zero_point, 8, INT8_GROUP)


def pack_float(weight: Tensor) -> PackedLinear:
    """Return a float weight [out, in] packed as float16."""
    words = _tiles(weight.half(), FLOAT_BLOCK, FLOAT_BLOCK)
    no_scales = torch.zeros(1, dtype=torch.int32, device=weight.device)
    rows, columns = weight.shape
    return PackedLinear(words, no_scales, rows, columns, bits=16, group=FLOAT_BLOCK)


def unpack(packed: PackedLinear) -> Tensor:
    """Return the weight, float32 [out, in]; the inverse of packing, bit for bit."""
    tiles, blocks, rows, words = packed.words.shape
    if packed.bits == 16:
        weight = packed.words.permute(0, 2, 1, 3).reshape(tiles * rows, -1).float()
        return weight[: packed.out_features, : packed.in_features]
    bits, pack_factor = packed.bits, PACK_FACTOR[packed.bits]
    wide = packed.words.int() & 0xFFFF
    lanes = torch.stack([(wide >> (bits * j)) & (2**bits - 1) for j in range(pack_factor)], 3)
    q = lanes.permute(0, 2, 1, 3, 4).reshape(tiles * rows, blocks * words * pack_factor)
    halves = packed.scale_zero.view(torch.float16).unflatten(2, (ROWS, 2)).permute(0, 2, 1, 3)
    scale, neg_zero_point = (
        half.repeat_interleave(packed.group, 1) for half in halves.flatten(0, 1).float().unbind(2)
    )
    columns = min(q.shape[1], scale.shape[1])
    q, scale, neg_zero_point = (x[:, :columns] for x in (q, scale, neg_zero_point))
    weight = (q.float() + neg_zero_point / ZERO_UNIT) * scale
    return weight[: packed.out_features, : packed.in_features]


def interleave(gate: PackedLinear, up: PackedLinear) -> PackedLinear:
    """Return tiles of two weights of one shape in turn: 16 channels of `gate`, then of `up`."""
    assert gate.words.shape == up.words.shape
    assert (gate.bits, gate.group) == (up.bits, up.group)
    words = torch.stack([gate.words, up.words], 1).flatten(0, 1)
    scales = gate.scale_zero
    if gate.bits < 16:
        scales = torch.stack([gate.scale_zero, up.scale_zero], 1).flatten(0, 1)
    rows = words.shape[0] * ROWS
    return PackedLinear(words, scales, rows, gate.in_features, gate.bits, gate.group)


def concat_rows(weights: Sequence[PackedLinear]) -> PackedLinear:
    """Return weights of the same input channels as one; all but the last in whole PAD_ROWS."""
    first = weights[0]
    assert all(weight.out_features % PAD_ROWS == 0 for weight in weights[:-1])
    assert len({(weight.in_features, weight.bits, weight.group) for weight in weights}) == 1
    scales = first.scale_zero
    if first.bits < 16:
        scales = torch.cat([weight.scale_zero for weight in weights])
    rows = sum(weight.out_features for weight in weights)
    words = torch.cat([weight.words for weight in weights])
    return PackedLinear(words, scales, rows, first.in_features, first.bits, first.group)


def empty_like_packed(
    out_features: int, in_features: int, bits: int, group: int, device: str
) -> PackedLinear:
    """Return a PackedLinear of that size without values, e.g. on the meta device."""
    block = block_size(bits, group)
    tiles, blocks = _up(out_features, PAD_ROWS) // ROWS, -(-in_features // block)
    word = torch.float16 if bits == 16 else torch.int16
    words = torch.empty(
        (tiles, blocks, ROWS, block // PACK_FACTOR[bits]), dtype=word, device=device
    )
    groups = max(blocks * block // group, -(-in_features // group))
    shape = (1,) if bits == 16 else (tiles, groups, ROWS)
    scales = torch.empty(shape, dtype=torch.int32, device=device)
    group = FLOAT_BLOCK if bits == 16 else group
    return PackedLinear(words, scales, out_features, in_features, bits, group)


def _pack(q: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group: int) -> PackedLinear:
    rows, columns = q.shape
    block, pack_factor = block_size(bits, group), PACK_FACTOR[bits]
    lanes = _tiles(q, block, block).unflatten(3, (pack_factor, -1)).int()
    shifted = [lanes[..., j, :] << (bits * j) for j in range(pack_factor)]
    words = torch.stack(shifted).sum(0)
    words = torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)
    neg_zero_point = (zero_point.float() * -ZERO_UNIT).half()
    table = torch.stack([scale.half(), neg_zero_point], 2).view(torch.int32).flatten(1)
    blocks = words.shape[1]
    groups = max(blocks * block // group, table.shape[1])
    table = torch.nn.functional.pad(table, (0, groups - table.shape[1], 0, -rows % PAD_ROWS))
    scale_zero = table.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
    return PackedLinear(words.contiguous(), scale_zero, rows, columns, bits=bits, group=group)


def _tiles(matrix: Tensor, block: int, width: int) -> Tensor:
    """Return [out, in] as [tiles, blocks, ROWS, width], padded with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % block, 0, -rows % PAD_ROWS))
    return padded.unflatten(1, (-1, width)).unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
