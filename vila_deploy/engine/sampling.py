"""How the next token is chosen from logits."""

from __future__ import annotations

import math
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
        _check_range("max_new_tokens", self.max_new_tokens, 1, math.inf)
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_p", self.top_p, math.nextafter(0, 1), 1)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, math.inf)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    # NaN is in no range.
    if not low <= value <= high:
        limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise VilaDeployError(f"{name} is {short(value)}", fix=f"give a number {limits}")


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
