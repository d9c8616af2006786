"""Tiles of the products of a step at every shape of the model table."""

from __future__ import annotations

import pytest

from tests.support.kernel_cases import model_table
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.tile_config import (
    DEVICES,
    RESERVED_SHARED_BYTES,
    ROW_BYTES,
    GemvTile,
    attention_block,
    attention_shared_bytes,
    attention_splits,
    gate_up_tile,
    gemv_programs,
    gemv_tile,
)

H200 = ComputeCapability(9, 0)
BLOCK, KIB = 128, 1 << 10


def tiles(capability: ComputeCapability) -> dict[tuple[int, int], GemvTile]:
    """(out, in) → tile of every int4 product of every model."""
    found = {}
    for model in model_table():
        queries = model.num_heads * model.head_dim
        gate_up = (2 * model.intermediate_size, model.hidden_size)
        others = (
            (queries + 2 * model.num_kv_heads * model.head_dim, model.hidden_size),
            (model.hidden_size, queries),
            (model.hidden_size, model.intermediate_size),
        )
        found[gate_up] = gate_up_tile(capability, gate_up[0], gate_up[1] // BLOCK)
        found |= {shape: gemv_tile(capability, shape[0], shape[1] // BLOCK) for shape in others}
    return found


@pytest.mark.parametrize("capability", DEVICES, ids=str)
def test_the_memory_is_kept_busy(capability: ComputeCapability) -> None:
    """So many bytes are on their way to a multiprocessor, or all that a small product has."""
    gpu = DEVICES[capability]
    for (rows, columns), tile in tiles(capability).items():
        programs, blocks = -(-rows // tile.rows), columns // BLOCK
        on_their_way = min((tile.stages - 1) * tile.split, blocks)
        in_flight = on_their_way * tile.rows * ROW_BYTES * programs / gpu.processors
        assert in_flight >= gpu.bytes_in_flight or on_their_way == blocks, (rows, columns, tile)


def test_programs_are_those_of_the_tile() -> None:
    for capability in DEVICES:
        for (rows, columns), tile in tiles(capability).items():
            if tile == gemv_tile(capability, rows, columns // BLOCK):
                assert gemv_programs(capability, rows) == -(-rows // tile.rows)


@pytest.mark.parametrize("capability", DEVICES, ids=str)
def test_attention_has_a_program_for_each_multiprocessor_at_most(
    capability: ComputeCapability,
) -> None:
    """All at once, each with a block at least; more heads than that can't be helped."""
    processors = DEVICES[capability].processors
    for model in model_table():
        for max_seq_len in (1, 64, 65, 1024, 32768):
            splits = attention_splits(capability, model.num_kv_heads, max_seq_len)
            assert splits == 1 or splits * model.num_kv_heads <= processors
            assert (splits - 1) * attention_block(capability) < max_seq_len
            assert splits <= 16
    room = DEVICES[capability].shared_kib * KIB
    assert attention_shared_bytes(capability) + RESERVED_SHARED_BYTES <= room


def test_splits_of_the_h200() -> None:
    """Of 132 multiprocessors, behind 20, 40 and 8 key heads."""
    assert [attention_splits(H200, heads, 1024) for heads in (20, 40, 8)] == [6, 3, 16]
