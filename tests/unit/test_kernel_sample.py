"""Drawing a token on the device against sorting and summing."""

from __future__ import annotations

import kernel_cases  # noqa: F401  sets TRITON_INTERPRET
import pytest
import torch
from kernel_cases import generator
from vila_deploy.kernels import sample as module
from vila_deploy.kernels.sample import kept_reference, sample, sample_reference


def draw(logits: torch.Tensor, uniform: float, temperature: float, top_p: float) -> int:
    numbers = torch.full((8,), torch.nan)
    numbers[4] = uniform
    token, position = torch.full((1,), -1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    history = torch.zeros(8, dtype=torch.int32)
    sample(logits[None], numbers, token, history, position, temperature, top_p)()
    assert (int(position), int(history[4])) == (4, int(token))
    return int(token)


@pytest.mark.parametrize(
    ("uniform", "temperature", "top_p"),
    [(0.0, 1.0, 0.9), (0.4, 0.7, 0.5), (0.93, 1.3, 0.8), (0.999, 1.0, 1.0), (0.5, 0.2, 1e-6)],
)
def test_same_token_as_sorting(
    uniform: float, temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 32)  # several chunks, the last one not full
    logits = torch.randn(100, generator=generator(int(uniform * 1000))) * 3
    found = draw(logits, uniform, temperature, top_p)
    assert found == sample_reference(logits, uniform, temperature, top_p)
    assert kept_reference(logits, temperature, top_p)[found]
    if top_p < 1e-3:
        assert found == int(logits.argmax())
