"""Packed weights stand for exactly what they were packed from."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import generator, random_int4
from vila_deploy.kernels.packed_linear import (
    ROWS,
    block_size,
    empty_like_packed,
    interleave,
    pack_float,
    pack_int4,
    pack_int8,
    unpack,
)


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("rows", "groups"), [(32, 2), (40, 3), (1, 1), (100, 5)])
def test_int4_comes_back_bit_for_bit(group: int, rows: int, groups: int) -> None:
    linear = random_int4(rows, groups * group, group, generator())
    assert torch.equal(unpack(pack_int4(linear)), linear.dequantize())


def test_quantized_values_lie_where_the_layout_says() -> None:
    linear = random_int4(48, 256, 128, generator())
    words = pack_int4(linear).words.int() & 0xFFFF
    row, channel = 37, 128 + 2 * 32 + 5  # second block, lane 2, word 5
    assert words[row // ROWS, 1, row % ROWS, 5] >> 8 & 15 == linear.q[row, channel]


def test_a_row_of_a_block_is_whole_sectors() -> None:
    """A program's load of a row is at least 32 bytes, of a tile at least 512, without gaps."""
    for bits, group in ((4, 16), (4, 128), (8, 128), (16, 64)):
        packed = empty_like_packed(64, 512, bits, group, "cpu")
        assert packed.words.is_contiguous()
        assert packed.words.shape[3] * 2 >= 32
        assert packed.block == block_size(bits, group)


def test_bytes_of_a_pass() -> None:
    packed = pack_int4(random_int4(64, 1024, 128, generator()))
    assert packed.size_bytes == 64 * 1024 // 2 + 64 * 8 * 4
    assert pack_float(torch.zeros(64, 1024)).size_bytes == 64 * 1024 * 2


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (33, 100)])
def test_int8_and_float_come_back(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=generator()).half()
    assert torch.equal(unpack(pack_float(weight)), weight.float())
    found, whole = unpack(pack_int8(weight)), weight.float()
    scale = whole.abs().amax(1, keepdim=True) / 127
    assert ((found - whole).abs() <= scale * 0.51).all()


def test_all_zero_weights_stay_zero() -> None:
    assert not unpack(pack_int8(torch.zeros(16, 128))).any()


def test_interleaved_tiles_alternate() -> None:
    gate, up = (random_int4(64, 128, 128, generator(seed)) for seed in (1, 2))
    both = unpack(interleave(pack_int4(gate), pack_int4(up))).unflatten(0, (-1, 2, ROWS))
    assert torch.equal(both[:, 0].flatten(0, 1), gate.dequantize())
    assert torch.equal(both[:, 1].flatten(0, 1), up.dequantize())


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 64), (4, 256), (8, 128), (16, 64)])
def test_empty_has_the_shapes_of_the_real_one(bits: int, group: int) -> None:
    rows, columns = 40, 768
    if bits == 4:
        real = pack_int4(random_int4(rows, columns, group, generator()))
    else:
        real = (pack_int8 if bits == 8 else pack_float)(torch.zeros(rows, columns))
    empty = empty_like_packed(rows, columns, bits, group, "meta")
    assert (empty.words.shape, empty.words.dtype) == (real.words.shape, real.words.dtype)
    assert empty.scale_zero.shape == real.scale_zero.shape
    assert (empty.bits, empty.group, empty.block) == (real.bits, real.group, real.block)
