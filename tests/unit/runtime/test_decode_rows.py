"""Steps of several sequences whose tokens the engine chooses, or the host, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.support.tiny import make_checkpoint
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.continuous_batching import ContinuousBatcher
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prompt import Prompt
from vila_deploy.runtime.request import Event, Finished, GenerationRequest
from vila_deploy.utils.arrays import Floats

VOCAB, FIRST, ON_DEVICE = 384, 20, 5


class CountingSession:
    """Says the number behind each token: from 20 on by its logits, from 5 on by its own choice.

    `calls` records how many rows and how many rows of logits each step was asked for.
    """

    slots, max_seq_len, prefill_chunk = 3, 40, 40

    def __init__(self) -> None:
        self.held = [0] * self.slots
        self.calls: list[tuple[int, int]] = []

    def length(self, slot: int) -> int:
        return self.held[slot]

    def keep(self, slot: int, tokens: int) -> None:
        self.held[slot] = tokens

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return np.zeros((len(tokens), 4), np.float32)

    def prefill(
        self, slot: int, embeds: Floats, all_logits: bool = False, more: bool = False
    ) -> Floats:
        self.held[slot] += len(embeds)
        return _logits([FIRST])[0]

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        self.calls.append((len(slots), len(slots)))
        return self._append(slots, tokens)

    def first_token(self, slot: int, sampling: SamplingParams) -> int:
        return ON_DEVICE

    def next_tokens(
        self, slots: Sequence[int], tokens: Sequence[int], logits_of: Sequence[int] = ()
    ) -> tuple[list[int], Floats]:
        self.calls.append((len(slots), len(logits_of)))
        return [token + 1 for token in tokens], self._append(slots, tokens)[list(logits_of)]

    def _append(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        for slot in slots:
            self.held[slot] += 1
        return _logits([token + 1 for token in tokens])


def _logits(tokens: Sequence[int]) -> Floats:
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    logits[range(len(tokens)), tokens] = 1.0
    return logits


def test_the_engine_chooses_where_it_can(tmp_path: Path) -> None:
    """In one step with those that the host chooses, whose logits alone are read."""
    session = CountingSession()
    tokenizer = load_tokenizer(make_checkpoint(tmp_path / "c") / "llm")
    batcher = ContinuousBatcher(session, tokenizer, (2,), ImageCache())  # type: ignore[arg-type]
    events: list[list[Event]] = [[], [], []]
    for heard, logprobs in zip(events, (None, 1, None), strict=True):
        request = GenerationRequest(Prompt(((7, 8, 9),)), SamplingParams(4), logprobs=logprobs)
        batcher.submit(request, heard.append)
    while batcher.step():
        pass
    answers = []
    for heard in events:
        assert isinstance(heard[-1], Finished)
        answers.append(heard[-1].tokens)
    assert answers == [(5, 6, 7, 8), (20, 21, 22, 23), (5, 6, 7, 8)]
    assert (3, 1) in session.calls, "one step for all"
    assert (1, 0) in session.calls, "no logits of those chosen by the engine alone"
    asked = SamplingParams(3, repetition_penalty=1.01)
    session.calls.clear()
    batcher.submit(GenerationRequest(Prompt(((3, 4),)), asked), events[0].append)
    while batcher.step():
        pass
    assert set(session.calls) == {(1, 1)}, "logits of those that the engine can't choose"
