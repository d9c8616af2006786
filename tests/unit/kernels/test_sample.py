"""Drawing a token on the device against sorting and summing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.kernel_cases import generator
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.sampling import sample as sample_on_host
from vila_deploy.kernels import sample as module
from vila_deploy.kernels.sample import nucleus_reference, sample, sample_reference


def draw(logits: torch.Tensor, uniform: float, temperature: float, top_p: float) -> int:
    numbers = torch.full((8,), torch.nan)
    numbers[4] = uniform
    token, position = torch.full((1,), -1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    history = torch.zeros(8, dtype=torch.int32)
    settings = torch.tensor([1 / temperature, top_p])
    sample(logits[None], numbers, settings, token, history, position, step=True)()
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
    assert nucleus_reference(logits, temperature, top_p)[found]
    if top_p < 1e-3:
        assert found == int(logits.argmax())


def test_the_first_token_belongs_to_the_position_itself() -> None:
    """After a prompt: it takes that position's number and moves nothing."""
    logits, numbers = torch.randn(50, generator=generator()), torch.tensor([0.1, 0.7, 0.95, 0.3])
    token, settings = torch.full((1,), -1, dtype=torch.int32), torch.tensor([1.0, 1.0])
    position, history = torch.tensor([2], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    sample(logits[None], numbers, settings, token, history, position, step=False)()
    assert int(token) == sample_reference(logits, 0.95, 1.0, 1.0)
    assert int(position) == 2
    assert not history.any()


def test_draws_follow_the_hosts_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equally spaced numbers draw each token as often as the host's own rule gives it weight."""
    monkeypatch.setattr(module, "ROUNDS", 30)
    logits, count = torch.randn(12, generator=generator(5)) * 2, 100
    expected = host_probabilities(logits.numpy(), SamplingParams(temperature=0.8, top_p=0.85))
    found = np.zeros(len(expected))
    for i in range(count):
        found[draw(logits, (i + 0.5) / count, 0.8, 0.85)] += 1 / count
    assert np.abs(found - expected).max() <= 1 / count
    assert not found[expected == 0].any()


class _Recorded:
    """In place of a random generator: keeps what it is asked to draw from."""

    def choice(self, kept: np.ndarray, p: np.ndarray) -> int:
        self.kept, self.p = kept, p
        return int(kept[0])


def host_probabilities(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """What `generate.choose` draws from, by token."""
    recorded = _Recorded()
    sample_on_host(logits, sampling, recorded)
    found = np.zeros(len(logits))
    found[recorded.kept] = recorded.p
    return found
