"""The product of one to eight tokens with a packed weight, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    CAPABILITY,
    assert_exact_as_half,
    generator,
    halves,
    plain,
    random_packed,
    unwritten,
)
from vila_deploy.kernels.gemv import gemv, gemv_reference
from vila_deploy.kernels.packed_linear import PackedLinear


def run(x: torch.Tensor, weight: PackedLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = unwritten(len(x), weight.out_features)
    gemv(x, weight, bias, y, CAPABILITY)()
    return y


@pytest.mark.parametrize(
    ("rows", "columns", "group", "tokens"),
    [(8, 128, 128, 1), (40, 192, 64, 2), (48, 320, 32, 8), (33, 80, 16, 5), (64, 768, 256, 3)],
)
def test_odd_shapes_and_every_group_size(rows: int, columns: int, group: int, tokens: int) -> None:
    random = generator(rows)
    weight = random_packed(rows, columns, 4, random, group)
    x, bias = halves(tokens, columns, random), torch.randn(rows, generator=random)
    half = plain(x, weight) + bias.half()
    assert_exact_as_half(run(x, weight, bias), gemv_reference(x, weight, bias), half)


@pytest.mark.parametrize("bits", [8, 16])
def test_odd_shapes_of_other_bits(bits: int) -> None:
    random = generator(bits)
    weight, x = random_packed(33, 300, bits, random), halves(3, 300, random)
    assert_exact_as_half(run(x, weight), gemv_reference(x, weight, None), plain(x, weight))


def test_wide_tiles_equal_narrow_ones() -> None:
    """The 32-row tile's sums are in another order, they are no other sums."""
    random = generator()
    weight, x = random_packed(64, 512, 4, random), halves(1, 512, random)
    wide = unwritten(1, 64)
    launch = gemv(x, weight, None, wide, CAPABILITY)
    constants = {**launch.constants, "ROWS": 32, "SPLIT": 4}
    type(launch)(launch.kernel, (2,), launch.args, constants, 4)()
    assert torch.allclose(wide, run(x, weight), rtol=2e-3, atol=1e-2)


def test_columns_of_tokens_do_not_mix() -> None:
    random = generator()
    weight, x = random_packed(16, 256, 4, random), halves(8, 256, random)
    together = run(x, weight)
    for token in (0, 3, 7):
        assert torch.equal(run(x[token : token + 1], weight)[0], together[token])


def test_small_scales_and_large_activations() -> None:
    """Levels enter as subnormal float16; neither end of the range may be lost."""
    random = generator()
    weight = random_packed(16, 256, 4, random)
    x = halves(1, 256, random) * 1e-3
    x[0, 7] = 3e4
    assert_exact_as_half(run(x, weight), gemv_reference(x, weight, None), plain(x, weight))
