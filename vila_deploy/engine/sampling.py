"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError, short


@dataclass(frozen=True)
class SamplingParams:
    """Length and randomness of an answer; temperature 0 takes the most likely token.

    Args:
        max_new_tokens: at least 1.
        temperature: 0 to 100.
        top_p: above 0, at most 1: draw from the most likely tokens that hold this probability.
        seed: makes draws repeatable; None draws anew each time.

    Raises:
        VilaDeployError: a value out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        # NaN is in no range.
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
        )
        for name, valid, limits in rules:
            if not valid:
                value = short(getattr(self, name))
                raise VilaDeployError(f"{name} is {value}", fix=f"give a number {limits}")


def sample(logits: Floats, sampling: SamplingParams, random: np.random.Generator) -> int:
    """Return the next token for `logits` [vocab].

    The most likely one at temperature 0, else a draw from the smallest set of tokens whose
    probability reaches `top_p`.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    # A token stays if the mass before it is below top_p, so the most likely one always does.
    before = np.cumsum(probabilities[order]) - probabilities[order]
    candidates = order[before < sampling.top_p]
    weights = probabilities[candidates]
    return int(random.choice(candidates, p=weights / weights.sum()))
