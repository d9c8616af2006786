"""What callers ask an engine for, and the events by which they learn of the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.runtime.constraint import TokenConstraint
from vila_deploy.runtime.prompt import Prompt
from vila_deploy.runtime.token_sampler import TokenLogprob
from vila_deploy.utils.errors import VilaDeployError

# "stop": the model ended or a stop string came. "length": max_new_tokens. "context": the slot is
# full (OpenAI's API calls it "length" too). "timeout": the deadline.
FinishReason = Literal["stop", "length", "context", "cancelled", "timeout"]


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt and how to answer it.

    Args:
        stop: strings that end the answer where they would stand in it.
        logprobs: None, or how many of the most likely tokens to report beside each token.
        constraint: a grammar, for this request alone.
        deadline_s: longest time from submission to the end of the answer; None for none.
        ignore_stop_tokens: go on to max_new_tokens, for load tests.
    """

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: TokenConstraint | None = None
    deadline_s: float | None = None
    ignore_stop_tokens: bool = False


@dataclass(frozen=True)
class TextPiece:
    """The next part of an answer's text, never empty but for its last tokens.

    Args:
        logprobs: of the tokens since the last piece, stop tokens left out; empty unless asked for.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Args:
        tokens: all tokens chosen, a stop token and those of a stop string included.
        text: all pieces together.
        prompt_tokens: length of the prompt.
        cached_tokens: those of them that were in the cache already.
        timings_ms: "queue", "vision", "prefill" and "decode", which add up to the whole wait.
        inter_token_ms: time from each token to the next.
    """

    finish_reason: FinishReason
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    timings_ms: dict[str, float]
    inter_token_ms: tuple[float, ...] = ()

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)

    @property
    def first_token_ms(self) -> float:
        """Return the wait for the first token."""
        return sum(self.timings_ms[name] for name in ("queue", "vision", "prefill"))


@dataclass(frozen=True)
class Failed:
    """A request that ended without an answer; others are not concerned."""

    error: VilaDeployError


Event = TextPiece | Finished | Failed
OnEvent = Callable[[Event], None]


class Ticket:
    """A submitted request: what its submitter holds on to. Safe from any thread."""

    def __init__(self) -> None:
        self._cancelled = self._done = False

    def cancel(self) -> None:
        """End the request with the next step; a request that is done stays as it is."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def done(self) -> bool:
        """Return whether the last event, `Finished` or `Failed`, has been sent."""
        return self._done

    def finish(self) -> None:
        """Mark the request as done; the engine's thread calls it."""
        self._done = True
