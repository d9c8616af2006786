"""Logits, and the greedy token chosen on the device."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    CAPABILITY,
    EPSILON,
    assert_exact_as_half,
    generator,
    plain,
    random_packed,
    squares_of,
    unwritten,
)
from vila_deploy.kernels.argmax import argmax, argmax_reference
from vila_deploy.kernels.head import head, head_reference
from vila_deploy.kernels.tile_config import gemv_programs


@pytest.mark.parametrize(("bits", "tokens"), [(16, 1), (8, 8), (4, 3)])
def test_logits_and_their_argmax(bits: int, tokens: int) -> None:
    random = generator(bits)
    rows, columns = 100, 256
    weight = random_packed(rows, columns, bits, random)
    residual = torch.randn(tokens, columns, generator=random)
    x, squares = residual.half(), squares_of(residual, 2)
    logits, count = unwritten(tokens, rows, dtype=torch.float32), gemv_programs(CAPABILITY, rows)
    best, index = torch.full((count, 8), torch.nan), torch.full((count, 8), -1, dtype=torch.int32)
    head(x, squares, weight, logits, best, index, EPSILON, 1.0, CAPABILITY)()
    expected = head_reference(x, squares, weight, EPSILON, 1.0)
    assert_exact_as_half(logits, expected, plain(residual.half(), weight) * 1.0)

    token = torch.full((tokens,), -1, dtype=torch.int32)
    history, position = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    argmax(best, index, token, history, position, step=False)()
    assert torch.equal(token.long(), argmax_reference(logits))
    assert not position.any()


def test_equal_logits_give_the_lowest_token() -> None:
    best = torch.tensor([[1.0], [3.0], [3.0], [2.0]]).expand(4, 8).contiguous()
    index = torch.tensor([[5], [40], [33], [70]], dtype=torch.int32).expand(4, 8).contiguous()
    token, position = torch.zeros(1, dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    history = torch.zeros(16, dtype=torch.int32)
    argmax(best, index, token, history, position, step=True)()
    assert (int(token), int(position), int(history[8])) == (33, 8, 33)
    assert int(history.sum()) == 33


def test_the_last_position_is_not_overrun() -> None:
    best, index = torch.zeros(1, 8), torch.full((1, 8), 9, dtype=torch.int32)
    token, position = torch.zeros(1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    history = torch.zeros(8, dtype=torch.int32)
    argmax(best, index, token, history[:4], position, step=True)()
    assert not history[4:].any()
