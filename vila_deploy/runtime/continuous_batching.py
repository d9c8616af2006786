"""Serve several requests on one engine at once, step by step; no threads in here."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from vila_deploy.engine.session import ChoosesTokens, Session
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.runtime.answer_text import AnswerText
from vila_deploy.runtime.decode_rows import decode_rows
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prefill import PrefillStep, prefill_steps
from vila_deploy.runtime.prefix_cache import prefix_cache_of
from vila_deploy.runtime.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    OnEvent,
    TextPiece,
    Ticket,
)
from vila_deploy.runtime.token_sampler import TokenLogprob, TokenSampler, token_logprob
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

# A 3B on two cores prefills 64 tokens in about the time of 8 decode steps; chunks of 256 would take
# a tenth less time for each token.
PREFILL_CHUNK = 64


@dataclass(eq=False)
class Waiting:
    """A request that has no slot yet; `submitted` is in seconds of `time.monotonic`."""

    request: GenerationRequest
    on_event: OnEvent
    ticket: Ticket = field(default_factory=Ticket)
    submitted: float = field(default_factory=time.monotonic)

    def ended_early(self) -> FinishReason | None:
        """Return why the request ends now, or None if it goes on."""
        if self.ticket.cancelled:
            return "cancelled"
        limit = self.request.deadline_s
        if limit is not None and time.monotonic() - self.submitted >= limit:
            return "timeout"
        return None

    def send(self, event: Event) -> None:
        """Tell the submitter; one whose callback fails has lost interest."""
        try:
            self.on_event(event)
        except Exception:
            self.ticket.cancel()


@dataclass(eq=False)
class _Running:
    """A request in its slot, and what it has said; `stream` or `on_device`: the engine chose it."""

    waiting: Waiting
    slot: int
    cached: int
    prefill: Iterator[PrefillStep] | None
    sampler: TokenSampler
    text: AnswerText
    started: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    vision_s: float = 0.0
    stream: Iterator[int] | None = None
    on_device: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.waiting.request

    def show(self, text: str, last: bool = False) -> None:
        """Send the next piece of text, with the logprobs of all tokens since the one before."""
        if text or (last and self.logprobs):
            self.pieces.append(text)
            self.waiting.send(TextPiece(text, tuple(self.logprobs)))
            self.logprobs = []

    def finished(self, reason: FinishReason) -> Finished:
        now, submitted = time.monotonic(), self.waiting.submitted
        first = self.token_times[0] if self.token_times else now
        timings = {
            "queue": self.started - submitted,
            "vision": self.vision_s,
            "prefill": first - self.started - self.vision_s,
            "decode": now - first,
        }
        return Finished(
            reason,
            "".join(self.pieces),
            tuple(self.tokens),
            len(self.request.prompt),
            self.cached,
            {name: seconds * 1e3 for name, seconds in timings.items()},
            tuple(float(gap) * 1e3 for gap in np.diff(self.token_times)),
        )


@dataclass
class BatchingCounters:
    """What has been done since the beginning.

    Args:
        ended: requests by finish reason; "error" for failed ones.
        decode_steps: passes through the LLM that decoded.
        decoded_rows: sequences in all of these passes together.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    decode_steps: int = 0
    decoded_rows: int = 0
    ended: Counter[str] = field(default_factory=Counter)


class ContinuousBatcher:
    """Give waiting requests the free slots of a session and decode all of them together.

    Calls come from one thread. Each `step` is at most one image tile or chunk of a prompt, then one
    token for every sequence that decodes.

    Args:
        stop_token_ids: end an answer.
        prefill_chunk: most tokens of a prompt in a step while others decode.
        reuse_prefixes: False prefills every prompt from its first token.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        stop_token_ids: Collection[int],
        images: ImageCache,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = True,
    ):
        self.session, self.images = session, images
        self.prefixes = prefix_cache_of(session)
        self.counters = BatchingCounters()
        self._tokenizer, self._stops = tokenizer, frozenset(stop_token_ids)
        self._chunk, self._reuse = prefill_chunk, reuse_prefixes
        self._waiting: deque[Waiting] = deque()
        self._running: list[_Running] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> Ticket:
        """Let a request wait for a slot; first come, first served."""
        waiting = Waiting(request, on_event)
        self.enqueue(waiting)
        return waiting.ticket

    def enqueue(self, waiting: Waiting) -> None:
        """Do what `submit` does for a request that has its ticket already."""
        self._waiting.append(waiting)

    def step(self) -> bool:
        """Do the next piece of work; return whether there is more."""
        self._end_early()
        self._admit()
        self._prefill()
        self._decode()
        return bool(self._waiting or self._running)

    def abort(self) -> None:
        """End all requests as cancelled, also in the middle of an interrupted step."""
        for sequence in list(self._running):
            self._finish(sequence, "cancelled")
        while self._waiting:
            self._end_waiting(self._waiting.popleft(), "cancelled")

    def fail_all(self, error: VilaDeployError) -> None:
        """End all requests with an error."""
        for sequence in list(self._running):
            self._fail(sequence, error)
        while self._waiting:
            waiting = self._waiting.popleft()
            self._close(waiting, Failed(error), "error")

    def _end_early(self) -> None:
        """End what was cancelled or took too long."""
        for sequence in list(self._running):
            reason = sequence.waiting.ended_early()
            if reason is not None:
                self._finish(sequence, reason)
        for waiting in list(self._waiting):
            reason = waiting.ended_early()
            if reason is not None:
                self._waiting.remove(waiting)
                self._end_waiting(waiting, reason)

    def _admit(self) -> None:
        """Give the request that came first a slot, once the prompts before it are in the cache.

        So it may begin with what they have in common.
        """
        prefilling = any(sequence.prefill is not None for sequence in self._running)
        if prefilling or not self._waiting or not self.prefixes.free_slots:
            return
        waiting = self._waiting.popleft()
        request = waiting.request
        claimed = self.prefixes.claim(request.prompt.keys, self._reuse)
        assert claimed is not None
        slot, cached = claimed
        steps = prefill_steps(
            self.session, slot, request.prompt, cached, self.images, self._tokens_of_chunk
        )
        sampler = TokenSampler(request.sampling, request.prompt.token_ids, request.constraint)
        text = AnswerText(self._tokenizer, request.stop, request.prompt.strip)
        self._running.append(_Running(waiting, slot, cached, steps, sampler, text))

    def _tokens_of_chunk(self) -> int:
        """Return the most tokens of the next chunk: fewer while others wait for their next one."""
        decoding = any(sequence.tokens for sequence in self._running)
        return self._chunk if decoding else max(self._chunk, self.session.prefill_chunk)

    def _prefill(self) -> None:
        """Do one step of the prompt that is not in the cache yet."""
        sequence = next((s for s in self._running if s.prefill is not None), None)
        if sequence is None or sequence.prefill is None:
            return
        start = time.monotonic()
        try:
            step = next(sequence.prefill)
            keys = sequence.request.prompt.keys
            held = self.session.length(sequence.slot)
            self.prefixes.extend(sequence.slot, keys[held - step.tokens : held])
            if not step.tokens:
                sequence.vision_s += time.monotonic() - start
            if step.logits is not None:
                sequence.prefill = None
                self.counters.prompt_tokens += len(keys)
                self._begin(sequence, step.logits)
        except Exception as error:
            self._fail(sequence, error)

    def _begin(self, sequence: _Running, logits: Floats) -> None:
        """Choose the first token, or let the engine do it from now on."""
        request = sequence.request
        plain = request.sampling.on_device and (request.logprobs, request.constraint) == (
            None,
            None,
        )
        if plain and isinstance(self.session, ChoosesTokens):
            sequence.on_device = True
            self._accept(sequence, self.session.first_token(sequence.slot, request.sampling))
            return
        if plain and self.session.slots == 1:
            stops = () if request.ignore_stop_tokens else self._stops
            sequence.stream = self.session.stream(sequence.slot, stops, request.sampling)
        if sequence.stream is not None:
            self._next_of_stream(sequence)
        else:
            self._choose(sequence, logits)

    def _decode(self) -> None:
        """Decode one token for each sequence that has its first one."""
        decoding = [s for s in self._running if s.prefill is None and s.tokens]
        for sequence in decoding:
            if sequence.stream is not None:
                self.counters.decode_steps += 1
                self.counters.decoded_rows += 1
                self._guard(sequence, self._next_of_stream)
                return
        if not decoding:
            return
        try:
            found = self._decode_rows(decoding)
        except Exception:
            # One of them may be to blame alone.
            for sequence in decoding:
                self.prefixes.trim(sequence.slot)
                self._guard(sequence, lambda s: self._go_on(s, *self._decode_rows([s])))
            return
        for sequence, following in zip(decoding, found, strict=True):
            self._guard(sequence, partial(self._go_on, following=following))

    def _go_on(self, sequence: _Running, following: int | Floats) -> None:
        if isinstance(following, int):
            self._accept(sequence, following)
        else:
            self._choose(sequence, following)

    def _decode_rows(self, sequences: list[_Running]) -> list[int | Floats]:
        """Append each sequence's last token to its slot; return its next token or logits."""
        slots = [sequence.slot for sequence in sequences]
        tokens = [sequence.tokens[-1] for sequence in sequences]
        by_host = [row for row, sequence in enumerate(sequences) if not sequence.on_device]
        found = decode_rows(self.session, slots, tokens, by_host)
        for slot, token in zip(slots, tokens, strict=True):
            self.prefixes.extend(slot, [token])
        self.counters.decode_steps += 1
        self.counters.decoded_rows += len(slots)
        return found

    def _next_of_stream(self, sequence: _Running) -> None:
        assert sequence.stream is not None
        token = next(sequence.stream, None)
        if token is None:
            self._finish(sequence, "context")
        else:
            self._accept(sequence, token)

    def _choose(self, sequence: _Running, logits: Floats) -> None:
        token = sequence.sampler.choose(logits)
        count = sequence.request.logprobs
        if count is not None and not self._stops_at(sequence, token):
            sequence.logprobs.append(token_logprob(logits, token, count))
        self._accept(sequence, token)

    def _accept(self, sequence: _Running, token: int) -> None:
        """Append a token to the answer, show its text, and end the answer where it is complete."""
        sequence.tokens.append(token)
        sequence.token_times.append(time.monotonic())
        self.counters.generation_tokens += 1
        if self._stops_at(sequence, token):
            self._finish(sequence, "stop")
            return
        sequence.show(sequence.text.push(token))
        if sequence.text.stopped:
            self._finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.request.sampling.max_new_tokens:
            self._finish(sequence, "length")
        elif sequence.stream is None and self._is_full(sequence.slot):
            self._finish(sequence, "context")

    def _stops_at(self, sequence: _Running, token: int) -> bool:
        return token in self._stops and not sequence.request.ignore_stop_tokens

    def _is_full(self, slot: int) -> bool:
        return self.session.length(slot) >= self.session.max_seq_len

    def _guard(self, sequence: _Running, work: Callable[[_Running], None]) -> None:
        """Do the work of one sequence; its failure is its own."""
        try:
            work(sequence)
        except Exception as error:
            self._fail(sequence, error)

    def _finish(self, sequence: _Running, reason: FinishReason) -> None:
        sequence.show(sequence.text.finish(), last=True)
        self._leave(sequence)
        self._close(sequence.waiting, sequence.finished(reason), reason)

    def _fail(self, sequence: _Running, error: Exception) -> None:
        if sequence.waiting.ticket.done:
            raise error
        self._leave(sequence)
        # What a failed call has left in the slot is not known.
        self.prefixes.forget(sequence.slot)
        if not isinstance(error, VilaDeployError):
            failure = VilaDeployError("the engine failed", fix="ask again")
            failure.__cause__ = error
            error = failure
        self._close(sequence.waiting, Failed(error), "error")

    def _leave(self, sequence: _Running) -> None:
        """Give the slot back with what it holds of prompt and answer."""
        if sequence.stream is not None:
            close = getattr(sequence.stream, "close", None)
            if close is not None:
                close()
            prompt = len(sequence.request.prompt)
            held = self.session.length(sequence.slot) - prompt
            self.prefixes.extend(sequence.slot, sequence.tokens[:held])
        self._running.remove(sequence)
        self.prefixes.release(sequence.slot)

    def _end_waiting(self, waiting: Waiting, reason: FinishReason) -> None:
        timings = {"queue": (time.monotonic() - waiting.submitted) * 1e3}
        timings |= dict.fromkeys(("vision", "prefill", "decode"), 0.0)
        length = len(waiting.request.prompt)
        self._close(waiting, Finished(reason, "", (), length, 0, timings), reason)

    def _close(self, waiting: Waiting, event: Finished | Failed, reason: str) -> None:
        self.counters.ended[reason] += 1
        waiting.ticket.finish()
        waiting.send(event)
