"""Every kernel at every shape of the model table: the last program of its launch.

Programs don't know of each other, so one of them at the true sizes, with the true input channels,
shows what the shape could break: the loop's length, offsets, and what lies behind the last row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    CAPABILITY,
    EPSILON,
    assert_exact_as_half,
    error,
    generator,
    halves,
    model_table,
    plain,
    random_packed,
    run_program,
    squares_of,
    unwritten,
)
from vila_deploy.kernels import sample as sample_module
from vila_deploy.kernels.add_residual import add_residual, add_residual_reference
from vila_deploy.kernels.attention import SplitScratch, attention, attention_reference
from vila_deploy.kernels.dequantize import dequantize, dequantize_reference
from vila_deploy.kernels.embed import embed, embed_reference
from vila_deploy.kernels.gate_up import gate_up, gate_up_reference
from vila_deploy.kernels.gemm import gemm, gemm_reference
from vila_deploy.kernels.gemv import gemv, gemv_reference
from vila_deploy.kernels.head import head, head_reference
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.norm_qkv import norm_qkv, norm_qkv_reference
from vila_deploy.kernels.packed_linear import ROWS, PackedLinear, empty_like_packed
from vila_deploy.kernels.rope_kv import rope_kv, rope_kv_reference
from vila_deploy.kernels.sample import sample, sample_reference
from vila_deploy.kernels.tile_config import gemv_programs

Shape = tuple[int, int]
MODELS = model_table()
QKV = {((m.num_heads + 2 * m.num_kv_heads) * m.head_dim, m.hidden_size) for m in MODELS}
O_PROJ = {(m.hidden_size, m.num_heads * m.head_dim) for m in MODELS}
DOWN = {(m.hidden_size, m.intermediate_size) for m in MODELS}
GATE_UP = {(2 * m.intermediate_size, m.hidden_size) for m in MODELS}
HEADS = {(m.vocab_size, m.hidden_size) for m in MODELS}
ATTENTIONS = {(m.num_heads, m.num_kv_heads, m.head_dim) for m in MODELS}
LAST = 64  # channels that have values; the widest program has as many


def true_size(shape: Shape, bits: int) -> tuple[PackedLinear, PackedLinear]:
    """A weight of that size whose LAST channels have values, and those channels alone.

    The others are memory that nothing touches.
    """
    assert shape[0] % LAST in (0, LAST // 2)
    whole = empty_like_packed(*shape, bits, 128, "cpu")
    tile = random_packed(LAST, shape[1], bits, generator(sum(shape)))
    whole.words[-LAST // ROWS :] = tile.words
    if bits < 16:
        whole.scale_zero[-LAST // ROWS :] = tile.scale_zero
    return whole, tile


def run_last(launch: Launch, out_features: int) -> int:
    """Runs the last program → how many channels it has."""
    run_program(launch, *(size - 1 for size in launch.grid))
    rows = int(launch.constants["ROWS"])
    return out_features - (out_features - 1) // rows * rows


def normed_input(columns: int) -> tuple[Tensor, Tensor]:
    """x [1, columns] and the sums of squares that a kernel before left."""
    x = halves(1, columns, generator(columns))
    return x, squares_of(x, gemv_programs(CAPABILITY, columns))


def at_every(shapes: set[Any]) -> Any:
    return pytest.mark.parametrize("shape", sorted(shapes), ids=lambda s: "x".join(map(str, s)))


def assert_last(y: Tensor, count: int, reference: Tensor, half: Tensor) -> None:
    """The last `count` columns are right, and no others were written."""
    assert_exact_as_half(y[:, -count:], reference[:, -count:], half[:, -count:])
    assert y[:, :-count].isnan().all()


@at_every(QKV)
def test_norm_qkv(shape: Shape) -> None:
    (weight, tile), (x, squares) = true_size(shape, 4), normed_input(shape[1])
    bias, y = torch.randn(shape[0], generator=generator()), unwritten(1, shape[0])
    count = run_last(norm_qkv(x, squares, weight, bias, y, EPSILON, 2.0, CAPABILITY), shape[0])
    ours = bias[-LAST:]
    expected = norm_qkv_reference(x, squares, tile, ours, EPSILON, 2.0)
    normed = torch.nn.functional.rms_norm(x, x.shape[1:], None, EPSILON) * 2
    assert_last(y, count, expected, plain(normed, tile) + ours.half())


@at_every(O_PROJ | DOWN)
def test_add_residual(shape: Shape) -> None:
    weight, tile = true_size(shape, 4)
    random, rows = generator(shape[1]), shape[0]
    x, residual = halves(1, shape[1], random), torch.randn(1, rows, generator=random)
    norm, out = torch.rand(rows, generator=random), unwritten(1, rows)
    squares = unwritten(gemv_programs(CAPABILITY, rows), 8, dtype=torch.float32)
    new = residual.clone()
    count = run_last(add_residual(x, weight, norm, new, out, squares, CAPABILITY), rows)
    before, scale = residual[:, -LAST:], norm[-LAST:]
    expected, normed, _ = add_residual_reference(x, tile, scale, before)
    half = before.half() + plain(x, tile)
    assert_exact_as_half(new[:, -count:], expected[:, -count:], half[:, -count:])
    assert torch.equal(new[:, :-count], residual[:, :-count])
    assert_last(out, count, normed, half * scale.half())
    assert error(squares[-1, :1], expected[:, -count:].square().sum(1)) < 1e-4


@at_every(GATE_UP)
def test_gate_up(shape: Shape) -> None:
    (weight, tile), (x, squares) = true_size(shape, 4), normed_input(shape[1])
    y = unwritten(1, shape[0] // 2)
    count = run_last(gate_up(x, squares, weight, y, EPSILON, 1.0, CAPABILITY), shape[0]) // 2
    expected = gate_up_reference(x, squares, tile, LAST // 2, EPSILON, 1.0)
    normed = torch.nn.functional.rms_norm(x, x.shape[1:], None, EPSILON)
    gate, up = plain(normed, tile).unflatten(1, (-1, 2, ROWS)).unbind(2)
    half = torch.nn.functional.silu(gate) * up
    assert_last(y, count, expected, half.flatten(1))


@pytest.mark.parametrize("bits", [16, 8, 4])
@at_every(HEADS)
def test_head(shape: Shape, bits: int) -> None:
    (weight, tile), (x, squares) = true_size(shape, bits), normed_input(shape[1])
    programs = gemv_programs(CAPABILITY, shape[0])
    logits = unwritten(1, shape[0], dtype=torch.float32)
    best, index = torch.full((programs, 8), torch.nan), torch.zeros(programs, 8, dtype=torch.int32)
    launch = head(x, squares, weight, logits, best, index, EPSILON, 1.0, CAPABILITY)
    count = run_last(launch, shape[0])
    normed = torch.nn.functional.rms_norm(x, x.shape[1:], None, EPSILON)
    assert_last(logits, count, head_reference(x, squares, tile, EPSILON, 1.0), plain(normed, tile))
    assert float(best[-1, 0]) == float(logits[0, -count:].max())
    assert int(index[-1, 0]) == shape[0] - count + int(logits[0, -count:].argmax())


@at_every(QKV | O_PROJ | DOWN | GATE_UP)
def test_gemm(shape: Shape) -> None:
    weight, tile = true_size(shape, 4)
    x, y = halves(9, shape[1], generator(shape[0])), unwritten(9, shape[0])
    count = run_last(gemm(x, weight, None, y, CAPABILITY), shape[0])
    assert_last(y, count, gemm_reference(x, tile, None), plain(x, tile))


@at_every(QKV | O_PROJ | DOWN | GATE_UP)
def test_dequantize(shape: Shape) -> None:
    weight, tile = true_size(shape, 4)
    y = torch.empty(shape, dtype=torch.float16)
    y[-ROWS:] = torch.nan
    launch = dequantize(weight, y)
    run_program(launch, *(size - 1 for size in launch.grid))
    assert torch.equal(y[-ROWS:, -128:], dequantize_reference(tile)[-ROWS:, -128:])
    assert y[-ROWS:, :-128].isnan().all()


@at_every(DOWN)
def test_gemv(shape: Shape) -> None:
    """As the prompt's last few tokens use it; eight columns at once."""
    weight, tile = true_size(shape, 4)
    x, y = halves(8, shape[1], generator(shape[1])), unwritten(8, shape[0])
    count = run_last(gemv(x, weight, None, y, CAPABILITY), shape[0])
    assert_last(y, count, gemv_reference(x, tile, None), plain(x, tile))


@at_every(ATTENTIONS)
def test_attention_and_its_rotation(shape: tuple[int, int, int]) -> None:
    """The last key head over two splits of the cache, and the head that shares it."""
    heads, kv_heads, dim = shape
    random, at, positions = generator(heads), 90, 200
    qkv = halves(1, (heads + 2 * kv_heads) * dim, random)
    angles = torch.rand(positions, dim // 2, generator=random) * 6
    position = torch.tensor([at], dtype=torch.int32)
    keys, values = torch.randn(2, kv_heads, positions, dim, generator=random).half()
    q, out = unwritten(1, heads, dim), unwritten(1, heads * dim)
    rope = rope_kv(qkv, angles.cos(), angles.sin(), position, q, keys, values)
    for head_index in (heads - 1, heads + kv_heads - 1, heads + 2 * kv_heads - 1):
        run_program(rope, 0, head_index)
    wanted = rope_kv_reference(qkv, angles.cos(), angles.sin(), position, heads, kv_heads)
    assert_exact_as_half(q[:, -1], wanted[0][:, -1], wanted[0][:, -1].half())
    for cache, row in ((keys, wanted[1]), (values, wanted[2])):
        assert_exact_as_half(cache[-1, at], row[-1, 0], row[-1, 0].half())
    q[:] = halves(heads, dim, random)
    splits, merge = attention(
        q, keys, values, position, out, SplitScratch(1, heads, dim, 2, "cpu"), CAPABILITY
    )
    for split in range(2):
        run_program(splits, 0, kv_heads - 1, split)
    run_program(merge, heads - 1)
    expected = attention_reference(q, keys, values, position)
    k, v = (x[-1:, : at + 1] for x in (keys, values))
    half = torch.nn.functional.scaled_dot_product_attention(q[0, -1][None, None], k, v).flatten(1)
    assert_last(out, dim, expected, half)


@at_every(HEADS)
def test_embed(shape: Shape) -> None:
    hidden, random = shape[1], generator(shape[1])
    # The last row of the table; those before are memory that nothing touches.
    table, norm = torch.empty(shape, dtype=torch.float16), torch.rand(hidden, generator=random)
    table[-1] = torch.randn(hidden, generator=random)
    token = torch.tensor([shape[0] - 1], dtype=torch.int32)
    residual, out = unwritten(1, hidden, dtype=torch.float32), unwritten(1, hidden)
    squares = torch.zeros(1, 8)
    embed(token, table, norm, residual, out, squares)()
    expected, normed, total = embed_reference(token, table, norm)
    assert torch.equal(residual, expected)
    assert torch.equal(out, normed.half())
    assert torch.allclose(squares[0, :1], total)


@pytest.mark.parametrize("vocabulary", sorted({shape[0] for shape in HEADS}))
def test_sample(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "CHUNK", 1 << 16)
    logits = torch.randn(vocabulary, generator=generator(vocabulary)) * 3
    token, position, history = torch.zeros(3, 1, dtype=torch.int32)
    numbers, settings = torch.tensor([0.8]), torch.tensor([1 / 0.7, 0.9])
    sample(logits[None], numbers, settings, token, history, position, step=True)()
    assert int(token) == sample_reference(logits, 0.8, 0.7, 0.9)
