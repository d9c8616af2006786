"""Choose the tokens of one answer from logits, with all that it has held so far."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from vila_deploy.engine.sampling import SamplingParams, penalize_repetition, sample
from vila_deploy.runtime.constraint import TokenConstraint
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError


class TokenSampler:
    """Choose one token after the other.

    Args:
        prompt_tokens: ids that a repetition penalty counts as said already.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt_tokens: Collection[int] = (),
        constraint: TokenConstraint | None = None,
    ):
        self._sampling, self._constraint = sampling, constraint
        self._random = np.random.default_rng(sampling.seed)
        self._said = set(prompt_tokens) if sampling.repetition_penalty != 1 else None

    def choose(self, logits: Floats) -> int:
        """Return the next token for `logits` [vocab] and remember it.

        Raises:
            VilaDeployError: the constraint allows no token.
        """
        if self._said:
            said = np.fromiter((t for t in self._said if t < len(logits)), np.int64)
            logits = penalize_repetition(logits, said, self._sampling.repetition_penalty)
        if self._constraint is not None:
            logits = _masked(logits, self._constraint)
        token = sample(logits, self._sampling, self._random)
        if self._said is not None:
            self._said.add(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token


def _masked(logits: Floats, constraint: TokenConstraint) -> Floats:
    """Return `logits` with minus infinity where the constraint allows no token."""
    allowed = constraint.allowed()[: len(logits)]
    if not allowed.any():
        raise VilaDeployError("the answer's grammar allows no token", fix="use another grammar")
    masked = np.full_like(logits, -np.inf)
    masked[: len(allowed)][allowed] = logits[: len(allowed)][allowed]
    return masked


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer with its log probability, and the most likely ones in its place.

    Natural logarithms of the model's own probabilities: before temperature, penalty and grammar.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(logits: Floats, token: int, count: int) -> TokenLogprob:
    """Return the log probability of `token` and of the `count` most likely ones, best first."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    count = min(count, len(values))
    top = np.argpartition(-values, count - 1)[:count] if count else np.empty(0, np.int64)
    # Of equally likely tokens the one with the lower id comes first, as greedy decoding chooses.
    ordered = sorted((int(index) for index in top), key=lambda index: (-values[index], index))
    return TokenLogprob(
        token, float(values[token]), tuple((index, float(values[index])) for index in ordered)
    )
