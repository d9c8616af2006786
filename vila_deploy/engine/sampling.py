"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        top_k: draw from this many of the most likely tokens; 0 for no such limit.
        repetition_penalty: above 0, at most 100. Logits of tokens that prompt or answer hold
            already are divided by it where positive, else multiplied (Keskar et al. 2019); 1
            changes nothing.

    Raises:
        VilaDeployError: a value out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        # NaN is in no range.
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed is None or self.seed >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty <= 100,
                "above 0, at most 100",
            ),
        )
        for name, valid, limits in rules:
            if not valid:
                value = short(getattr(self, name))
                raise VilaDeployError(f"{name} is {value}", fix=f"give a number {limits}")

    @property
    def on_device(self) -> bool:
        """Return whether engines with sampling of their own can do it all."""
        return self.top_k == 0 and self.repetition_penalty == 1


def sample(logits: Floats, sampling: SamplingParams, random: np.random.Generator) -> int:
    """Return the next token for `logits` [vocab].

    The most likely one at temperature 0, else a draw: of the `top_k` most likely tokens, the
    smallest set whose probability reaches `top_p`.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    likeliest = _most_likely(logits, sampling.top_k)
    with np.errstate(over="ignore"):  # at tiny temperatures, where the rest has no probability
        scaled = (logits[likeliest].astype(np.float64) - float(logits.max())) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    # A token stays if the mass before it is below top_p, so the most likely one always does.
    before = np.cumsum(probabilities[order]) - probabilities[order]
    candidates = order[before < sampling.top_p]
    weights = probabilities[candidates]
    return int(likeliest[random.choice(candidates, p=weights / weights.sum())])


def penalize_repetition(logits: Floats, tokens: NDArray[np.int64], penalty: float) -> Floats:
    """Return `logits` [vocab] with `penalty` on `tokens`, different ids; see SamplingParams."""
    penalized, held = logits.copy(), logits[tokens]
    with np.errstate(all="ignore"):
        changed = np.where(held > 0, held / penalty, held * penalty)
    # A tiny penalty makes them infinite, whose differences would be NaN.
    largest = np.finfo(logits.dtype).max
    penalized[tokens] = np.clip(changed, -largest, largest)
    return penalized


def _most_likely(logits: Floats, count: int) -> NDArray[np.int64]:
    """Return the ids of the `count` largest logits in ascending order; all of them for 0."""
    if not 0 < count < len(logits):
        return np.arange(len(logits))
    return np.sort(np.argpartition(-logits, count - 1)[:count])
