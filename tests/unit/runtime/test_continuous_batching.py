"""Requests side by side: what each one hears, whatever happens to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.processing.images import Pixels
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.runtime.continuous_batching import ContinuousBatcher
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prompt import Prompt, PromptImage
from vila_deploy.runtime.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    TextPiece,
    Ticket,
)
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

HIDDEN, VOCAB, STOP = 4, 384, 2
WORK = 40  # most tokens that one call of the session below may take


class EchoSession:
    """Says the prompt's tokens again, from its first one on, in every slot of its own.

    `calls` records what was asked of it. Tokens of `broken` in a prompt or an answer make the call
    fail that they are part of.
    """

    max_seq_len, prefill_chunk = 200, WORK

    def __init__(self, slots: int, broken: Sequence[int] = ()):
        self.slots, self.broken = slots, set(broken)
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.prompts = [0] * slots
        self.calls: list[tuple[str, int]] = []

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def keep(self, slot: int, tokens: int) -> None:
        assert 0 <= tokens <= len(self.held[slot])
        del self.held[slot][tokens:]

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return np.repeat(np.array(tokens, np.float32)[:, None], HIDDEN, 1)

    def encode_images(self, pixels: Floats, grid: object = None) -> Floats:
        raise AssertionError

    def encode_tiles(self, pixels: Floats) -> Floats:
        self.calls.append(("tile", len(pixels)))
        if pixels.max() > 1:
            raise RuntimeError("heap address 0x7f")
        return np.full((len(pixels), 3, HIDDEN), 7.0, np.float32)

    def merge_tiles(self, features: Floats, grid: object) -> Floats:
        return features

    def prefill(
        self, slot: int, embeds: Floats, all_logits: bool = False, more: bool = False
    ) -> Floats:
        tokens = [int(token) for token in embeds[:, 0]]
        self.calls.append(("prefill", len(tokens)))
        self._check(tokens)
        self.held[slot] += tokens
        self.prompts[slot] = len(self.held[slot])
        return self._logits(slot)

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        self.calls.append(("decode", len(slots)))
        self._check(tokens)
        for slot, token in zip(slots, tokens, strict=True):
            self.held[slot].append(token)
        return np.stack([self._logits(slot) for slot in slots])

    def stream(self, slot: int, stops: object, sampling: object) -> None:
        return None

    def _check(self, tokens: Sequence[int]) -> None:
        if self.broken & set(tokens):
            raise RuntimeError("a kernel failed")

    def _logits(self, slot: int) -> Floats:
        said = len(self.held[slot]) - self.prompts[slot]
        logits = np.zeros(VOCAB, np.float32)
        logits[[self.held[slot][said], 9]] = 2.0, 1.0
        return logits


@dataclass
class Client:
    """A request and all that its submitter has heard."""

    ticket: Ticket
    events: list[Event] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextPiece))

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events
        assert sum(isinstance(event, Finished | Failed) for event in self.events) == 1
        return self.events[-1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_checkpoint(tmp_path_factory.mktemp("batching") / "c") / "llm")


def batcher_of(session: Any, tokenizer: Tokenizer, **options: Any) -> ContinuousBatcher:
    return ContinuousBatcher(session, tokenizer, (STOP,), ImageCache(), **options)


def submit(batcher: ContinuousBatcher, prompt: Prompt, tokens: int = 3, **options: Any) -> Client:
    sampling = SamplingParams(tokens, **options.pop("sampling", {}))
    events: list[Event] = []
    ticket = batcher.submit(GenerationRequest(prompt, sampling, **options), events.append)
    return Client(ticket, events)


def text_of(*tokens: int) -> Prompt:
    return Prompt((tokens,))


def with_image(value: float, *tokens: int, tiles: int = 1) -> Prompt:
    pixels = Pixels(np.full((tiles, 3, 2, 2), value, np.float32))
    image = PromptImage(pixels, f"{value}".encode(), (3,) * tiles)
    between: tuple[tuple[int, ...], ...] = ((),) * (tiles - 1)
    return Prompt(((1,), *between, tokens), (image,))


def run(batcher: ContinuousBatcher) -> int:
    steps = 1
    while batcher.step():
        steps += 1
    return steps


def test_each_gets_its_own_answer(tokenizer: Tokenizer) -> None:
    session = EchoSession(3)
    batcher = batcher_of(session, tokenizer)
    clients = [submit(batcher, text_of(10 + n, 20 + n, 30 + n), 8 + n % 3) for n in range(8)]
    run(batcher)
    for number, client in enumerate(clients):
        expected = (10 + number, 20 + number, 30 + number) * 4
        assert client.finished.tokens == expected[: 8 + number % 3]
        assert client.finished.finish_reason == "length"
        assert client.text == client.finished.text
        assert client.ticket.done
    assert ("decode", 3) in session.calls
    assert (batcher.num_running, batcher.num_waiting, batcher.prefixes.free_slots) == (0, 0, 3)
    counters = batcher.counters
    assert counters.generation_tokens == sum(len(client.finished.tokens) for client in clients)
    assert counters.prompt_tokens == 24
    assert counters.ended == {"length": 8}


def test_one_that_fails_ends_alone(tokenizer: Tokenizer) -> None:
    """In the vision encoder, in the prompt, in the middle of an answer and by its grammar."""
    session = EchoSession(4, broken=(66, 77))
    batcher = batcher_of(session, tokenizer)

    class NoToken:
        def allowed(self) -> np.ndarray:
            return np.zeros(VOCAB, np.bool_)

        def accept(self, token: int) -> None:
            raise AssertionError

    good = [submit(batcher, text_of(10, 11, 12, 13), 20)]
    bad = [
        submit(batcher, with_image(5.0, 30)),
        submit(batcher, text_of(31, 66)),
        submit(batcher, text_of(32, 33), constraint=NoToken()),
    ]
    good.append(submit(batcher, with_image(0.5, 34, 35)))
    for _ in range(6):
        batcher.step()
    # The last one breaks once it says its prompt's second token, while others decode.
    session.broken = {66}
    late = submit(batcher, text_of(40, 77, 41), 20)
    batcher.step()
    session.broken = {66, 77}
    run(batcher)
    for client in [*bad, late]:
        (failed,) = client.events[-1:]
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, VilaDeployError)
        assert "0x7f" not in str(failed.error)
        assert client.ticket.done
    assert [client.finished.finish_reason for client in good] == ["length", "length"]
    assert good[0].finished.tokens == (10, 11, 12, 13) * 5
    assert batcher.counters.ended == {"length": 2, "error": 4}
    assert batcher.prefixes.free_slots == 4
    again = submit(batcher, text_of(10, 11, 12, 13), 4)
    run(batcher)
    assert again.finished.tokens == (10, 11, 12, 13)


def test_a_callback_that_fails_ends_its_request_alone(tokenizer: Tokenizer) -> None:
    batcher = batcher_of(EchoSession(2), tokenizer)

    def hang_up(event: Event) -> None:
        raise ConnectionError

    batcher.submit(GenerationRequest(text_of(10, 11), SamplingParams(50)), hang_up)
    other = submit(batcher, text_of(20, 21), 30)
    run(batcher)
    assert other.finished.tokens == (20, 21) * 15
    assert batcher.counters.ended == {"cancelled": 1, "length": 1}
    assert batcher.counters.generation_tokens < 35


def test_nobody_waits_longer_than_a_tile_or_a_chunk_and_a_step(tokenizer: Tokenizer) -> None:
    """Between two decode steps there is at most one other call, and that is a small one."""
    session = EchoSession(4)
    batcher = batcher_of(session, tokenizer, prefill_chunk=16)
    steady = submit(batcher, text_of(10, 11, 12), 90)
    batcher.step()
    session.calls.clear()
    submit(batcher, text_of(*range(100, 195)))
    submit(batcher, with_image(0.1, *range(20, 60), tiles=5))
    submit(batcher, with_image(0.2, 20))
    for _ in range(3 * 16):
        batcher.step()
    assert steady.events
    kinds = [kind for kind, _ in session.calls]
    others = [index for index, kind in enumerate(kinds) if kind != "decode"]
    assert len(others) == 6 + 5 + 4 + 1 + 1
    assert all(kinds[index + 1] == "decode" for index in others)
    assert max(count for kind, count in session.calls if kind == "prefill") == 16
    assert max(count for kind, count in session.calls if kind == "tile") == 1
    run(batcher)
    # With nobody waiting, chunks are as large as the engine takes them.
    session.calls.clear()
    submit(batcher, text_of(*range(200, 295)))
    run(batcher)
    assert [count for kind, count in session.calls if kind == "prefill"] == [40, 40, 15]


def test_an_image_asked_about_again_costs_neither_vision_nor_prefill(tokenizer: Tokenizer) -> None:
    session = EchoSession(1)
    batcher = batcher_of(session, tokenizer)
    submit(batcher, with_image(0.5, 30, 31, 32, tiles=2))
    run(batcher)
    session.calls.clear()
    second = submit(batcher, with_image(0.5, 40, 41, tiles=2))
    run(batcher)
    assert [call for call in session.calls if call[0] != "decode"] == [("prefill", 2)]
    assert second.finished.cached_tokens == 7
    # Even where another prompt has taken the slot, the features are there.
    submit(batcher, text_of(50, 51, 52))
    run(batcher)
    session.calls.clear()
    submit(batcher, with_image(0.5, 40, 41, tiles=2))
    run(batcher)
    assert ("tile", 1) not in session.calls
    assert (batcher.images.hits, batcher.images.queries) == (1, 2)


def test_prompts_that_wait_begin_with_what_those_before_them_hold(tokenizer: Tokenizer) -> None:
    class Copying(EchoSession):
        def copy(self, source: int, target: int, tokens: int) -> None:
            self.held[target] = self.held[source][:tokens]

    session = Copying(4)
    batcher = batcher_of(session, tokenizer)
    shared = tuple(range(100, 130))
    clients = [submit(batcher, text_of(*shared, 10 + n, 20 + n), 40) for n in range(4)]
    run(batcher)
    assert [client.finished.cached_tokens for client in clients] == [0, 30, 30, 30]
    for number, client in enumerate(clients):
        assert client.finished.tokens[30:34] == (10 + number, 20 + number, *shared[:2])


def test_reuse_can_be_switched_off(tokenizer: Tokenizer) -> None:
    batcher = batcher_of(EchoSession(1), tokenizer, reuse_prefixes=False)
    for _ in range(2):
        client = submit(batcher, text_of(10, 11, 12))
        run(batcher)
        assert client.finished.cached_tokens == 0


def test_a_full_slot_ends_an_answer(tokenizer: Tokenizer) -> None:
    batcher = batcher_of(EchoSession(1), tokenizer)
    client = submit(batcher, text_of(*range(10, 200)), 50)
    run(batcher)
    assert client.finished.finish_reason == "context"
    assert len(client.finished.tokens) == 11


def test_stop_token_and_stop_strings(tokenizer: Tokenizer) -> None:
    batcher = batcher_of(EchoSession(3), tokenizer)
    words = tokenizer.encode("the rain is on the sun")
    ended = submit(batcher, text_of(words[0], STOP, *words), 50)
    ignored = submit(batcher, text_of(words[0], STOP, *words), 6, ignore_stop_tokens=True)
    stopped = submit(batcher, text_of(*words), 50, stop=("on the",))
    run(batcher)
    assert ended.finished.finish_reason == "stop"
    assert ended.finished.tokens == (words[0], STOP)
    assert len(ignored.finished.tokens) == 6
    assert stopped.finished.finish_reason == "stop"
    assert stopped.text == stopped.finished.text == "the rain is"
    assert ended.finished.completion_tokens == 2


def test_logprobs_come_with_their_text(tokenizer: Tokenizer) -> None:
    batcher = batcher_of(EchoSession(1), tokenizer)
    words = tokenizer.encode("the rain is")
    client = submit(batcher, text_of(*words, STOP), 20, logprobs=2)
    run(batcher)
    logprobs = [item for e in client.events if isinstance(e, TextPiece) for item in e.logprobs]
    assert [item.token for item in logprobs] == words, "the stop token is no part of the text"
    total = np.log(np.exp(2.0) + np.exp(1.0) + VOCAB - 2)
    for item in logprobs:
        assert item.logprob == pytest.approx(2 - total)
        assert [token for token, _ in item.top] == [item.token, 9]
        assert item.top[1][1] == pytest.approx(1 - total)


def test_a_constraint_chooses_among_allowed_tokens(tokenizer: Tokenizer) -> None:
    class Even:
        """Allows even tokens below 100."""

        def __init__(self) -> None:
            self.accepted: list[int] = []

        def allowed(self) -> np.ndarray:
            return np.arange(100) % 2 == 0

        def accept(self, token: int) -> None:
            self.accepted.append(token)

    batcher, even = batcher_of(EchoSession(1), tokenizer), Even()
    client = submit(batcher, text_of(10, 11, 12, 200), 4, constraint=even)
    run(batcher)
    assert client.finished.tokens == (10, 0, 12, 0)
    assert even.accepted == [10, 0, 12, 0]


def test_timings_add_up(tokenizer: Tokenizer) -> None:
    batcher = batcher_of(EchoSession(1), tokenizer)
    clients = [submit(batcher, with_image(0.1 * n, 10, 11), 5) for n in range(1, 4)]
    run(batcher)
    for client in clients:
        finished = client.finished
        assert set(finished.timings_ms) == {"queue", "vision", "prefill", "decode"}
        assert min(finished.timings_ms.values()) >= 0
        assert len(finished.inter_token_ms) == 4
        assert sum(finished.inter_token_ms) <= finished.timings_ms["decode"] + 1e-6
        assert finished.first_token_ms > 0


def test_an_engine_that_chooses_tokens_itself_does_so_where_it_can(tokenizer: Tokenizer) -> None:
    class Device(EchoSession):
        """Says 5, 6, 7, … from the device; appends every token but its last."""

        def stream(self, slot: int, stops: Any, sampling: Any) -> Any:
            def tokens() -> Any:
                for token in range(5, 5 + sampling.max_new_tokens):
                    yield token
                    self.held[slot].append(token)

            return tokens()

    session = Device(1)
    batcher = batcher_of(session, tokenizer)
    plain = submit(batcher, text_of(10, 11, 12), 4)
    host = submit(batcher, text_of(20, 21, 22), 4, sampling={"repetition_penalty": 1.01})
    run(batcher)
    assert plain.finished.tokens == (5, 6, 7, 8)
    assert host.finished.tokens[0] == 20
    goes_on = submit(batcher, text_of(20, 21, 22, *host.finished.tokens[:3], 30, 31), 2)
    run(batcher)
    assert goes_on.finished.cached_tokens == 6
    again = submit(batcher, text_of(20, 21, 22, *host.finished.tokens[:3], 30, 31, 5, 40, 41), 2)
    run(batcher)
    assert again.finished.cached_tokens == 9
    cut = submit(batcher, text_of(50, 51), 20)
    for _ in range(3):
        batcher.step()
    cut.ticket.cancel()
    run(batcher)
    assert cut.finished.finish_reason == "cancelled"
    assert session.length(0) == 2 + len(cut.finished.tokens) - 1
