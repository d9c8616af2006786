"""A row of the embedding table becomes the residual residual."""

from __future__ import annotations

import torch

from tests.support.kernel_cases import generator, unwritten
from vila_deploy.kernels.embed import embed, embed_reference


def test_rows_of_the_table() -> None:
    random = generator()
    table = torch.randn(50, 100, generator=random).half()
    norm, token = torch.rand(100, generator=random), torch.tensor([49, 0, 7], dtype=torch.int32)
    residual, out = unwritten(3, 100, dtype=torch.float32), unwritten(3, 100)
    squares = torch.zeros(1, 8)
    embed(token, table, norm, residual, out, squares)()
    expected, normed, sums = embed_reference(token, table, norm)
    assert torch.equal(residual, expected)
    assert torch.equal(out, normed.half())
    assert torch.allclose(squares[0, :3], sums)
