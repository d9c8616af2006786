"""Logits that are no numbers give no token, and what isn't a token reads nothing outside."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import unwritten
from vila_deploy.kernels.argmax import NO_TOKEN, argmax
from vila_deploy.kernels.embed import embed
from vila_deploy.kernels.sample import sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_there_is_no_greedy_token() -> None:
    best = torch.full((5, 8), torch.nan)
    index = torch.full((5, 8), 2147483647, dtype=torch.int32)
    best[:, 1], index[:, 1] = torch.arange(5.0), torch.arange(5)
    token, history = torch.zeros(2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    argmax(best, index, token, history, torch.zeros(1, dtype=torch.int32), step=False)()
    assert token.tolist() == [NO_TOKEN, 4]


def test_there_is_none_to_draw() -> None:
    token, position = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    settings, numbers = torch.tensor([1.0, 0.9]), torch.full((4,), 0.5)
    history = torch.zeros(4, dtype=torch.int32)
    for logits, expected in ((torch.full((1, 50), torch.nan), NO_TOKEN), (torch.zeros(1, 1), 0)):
        sample(logits, numbers, settings, token, history, position, step=True)()
        assert int(token) == int(history[int(position)]) == expected


@pytest.mark.parametrize(("token", "row"), [(NO_TOKEN, 0), (-(2**31), 0), (2**31 - 1, 4), (5, 4)])
def test_embeddings_of_what_is_no_token_are_of_one(token: int, row: int) -> None:
    around = torch.randn(7, 16).half()
    table, norm = around[1:6], torch.ones(16)
    residual, out = unwritten(1, 16, dtype=torch.float32), unwritten(1, 16)
    given = torch.tensor([token], dtype=torch.int32)
    embed(given, table, norm, residual, out, torch.zeros(1, 8))()
    assert torch.equal(residual[0], table[row].float())
