"""Serve requests of any thread on one engine, which a thread of its own runs."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass

from vila_deploy.runtime.continuous_batching import PREFILL_CHUNK, ContinuousBatcher, Waiting
from vila_deploy.runtime.image_cache import DEFAULT_IMAGE_CACHE_BYTES, ImageCache
from vila_deploy.runtime.open_engine import OpenedEngine
from vila_deploy.runtime.prompt import check_prompt_length
from vila_deploy.runtime.request import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    OnEvent,
    Ticket,
)
from vila_deploy.utils.errors import VilaDeployError, check_at_least

DEFAULT_QUEUE_SIZE = 64
# Weight of the latest answer in the running mean of how long one takes.
LATEST = 0.2
LOG = logging.getLogger(__name__)


class QueueFull(VilaDeployError):
    """As many requests wait as may; `retry_after_s` is when a place may be free, an estimate."""

    def __init__(self, queue_size: int, retry_after_s: int):
        super().__init__(
            f"{queue_size} requests wait already", fix=f"ask again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class ShuttingDown(VilaDeployError):
    """The scheduler takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", fix="ask again when it has restarted")


@dataclass(frozen=True)
class SchedulerStats:
    """What goes on, and what was done since the beginning.

    Args:
        cache_usage: share of all slots' positions that hold something.
        prefix_queries: tokens of all prompts; `prefix_hits` of them were cached.
        image_queries: images needed; the features of `image_hits` of them were held.
        decoded_rows: sequences in all decode steps together.
        ended: requests by finish reason; "error" for failed ones.
    """

    running: int
    waiting: int
    slots: int
    cache_usage: float
    prefix_queries: int
    prefix_hits: int
    image_queries: int
    image_hits: int
    image_cache_bytes: int
    prompt_tokens: int
    generation_tokens: int
    decode_steps: int
    decoded_rows: int
    ended: dict[str, int]


class Scheduler:
    """First come, first served into the free slots of an engine; close it before the engine.

    One thread owns the engine and calls every `on_event`, which must return at once. Nobody else
    may use the engine meanwhile.

    Args:
        queue_size: requests that may wait beside those that run.
        image_cache_bytes: most bytes of image features to keep.
        prefill_chunk: most tokens of a prompt between two decode steps.
        reuse_prefixes: False prefills every prompt from its first token.

    Raises:
        VilaDeployError: the engine has random weights and no tokenizer, or a number is negative.
    """

    def __init__(
        self,
        engine: OpenedEngine,
        queue_size: int = DEFAULT_QUEUE_SIZE,
        image_cache_bytes: int = DEFAULT_IMAGE_CACHE_BYTES,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse_prefixes: bool = True,
    ):
        check_at_least("queue_size", queue_size, 0)
        check_at_least("image_cache_bytes", image_cache_bytes, 0)
        check_at_least("prefill_chunk", prefill_chunk, 1)
        tokenizer = engine.require_tokenizer()
        self._engine, self._queue_size = engine, queue_size
        self._batcher = ContinuousBatcher(
            engine.session,
            tokenizer,
            engine.model.stop_token_ids,
            ImageCache(image_cache_bytes),
            prefill_chunk,
            reuse_prefixes,
        )
        self._submitted: deque[Waiting] = deque()
        self._in_flight, self._answer_s = 0, 0.0
        self._draining = self._aborting = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Return whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def prompt_limit(self) -> int:
        """Return the most tokens of a prompt."""
        return min(self._engine.max_input_len, self._engine.session.max_seq_len)

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> Ticket:
        """Let a request wait for a slot; from any thread.

        Args:
            on_event: called by the engine's thread with every event; the last one is `Finished` or
                `Failed`, always exactly one of them.

        Raises:
            QueueFull: too many wait already.
            ShuttingDown: `drain` or `close` was called.
            VilaDeployError: the prompt is too long.
        """
        check_prompt_length(len(request.prompt), self.prompt_limit)
        waiting = Waiting(request, lambda event: self._forward(event, on_event))
        with self._changed:
            if self._draining or not self.alive:
                raise ShuttingDown
            if self._in_flight >= self._engine.session.slots + self._queue_size:
                raise QueueFull(self._queue_size, self._retry_after_s())
            self._in_flight += 1
            self._submitted.append(waiting)
            self._changed.notify_all()
        return waiting.ticket

    def stats(self) -> SchedulerStats:
        """Return what goes on now; from any thread."""
        batcher, session = self._batcher, self._engine.session
        counters, prefixes, images = batcher.counters, batcher.prefixes, batcher.images
        return SchedulerStats(
            running=batcher.num_running,
            waiting=max(0, self._in_flight - batcher.num_running),
            slots=session.slots,
            cache_usage=prefixes.held_tokens / (session.slots * session.max_seq_len),
            prefix_queries=prefixes.queries,
            prefix_hits=prefixes.hits,
            image_queries=images.queries,
            image_hits=images.hits,
            image_cache_bytes=images.size_bytes,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            decode_steps=counters.decode_steps,
            decoded_rows=counters.decoded_rows,
            ended=dict(counters.ended),
        )

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those that are in; return whether all could end.

        After `timeout_s` the others end as cancelled.
        """
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: self._idle() or not self.alive, timeout_s)
            if not done:
                self._aborting = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._idle() or not self.alive)
        return done

    def close(self) -> None:
        """End all requests as cancelled, and the engine's thread."""
        with self._changed:
            self._draining = self._aborting = self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _idle(self) -> bool:
        return self._in_flight == 0

    def _retry_after_s(self) -> int:
        """Estimate when a slot takes the next waiting request; 1 to 60 seconds."""
        waves = self._in_flight / self._engine.session.slots
        return max(1, min(60, math.ceil(self._answer_s * waves)))

    def _forward(self, event: Event, on_event: OnEvent) -> None:
        """Pass an event on; the last one of a request makes room for another."""
        try:
            on_event(event)
        finally:
            if isinstance(event, Finished | Failed):
                with self._changed:
                    self._in_flight -= 1
                    if isinstance(event, Finished):
                        seconds = (
                            sum(event.timings_ms.values()) / 1e3 - event.timings_ms["queue"] / 1e3
                        )
                        self._answer_s += LATEST * (seconds - self._answer_s)
                    self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._in_flight or self._closing)
                while self._submitted:
                    self._batcher.enqueue(self._submitted.popleft())
                aborting, self._aborting = self._aborting, False
                if self._closing and not self._in_flight:
                    return
            try:
                if aborting:
                    self._batcher.abort()
                else:
                    self._batcher.step()
            except Exception:
                # A request's own failure does not get here.
                LOG.exception("the engine failed")
                self._batcher.fail_all(VilaDeployError("the engine failed", fix="ask again"))
                time.sleep(0.1)
