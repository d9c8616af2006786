"""Get the logits of a request of TensorRT-LLM's Executor token by token."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

# How long to wait for a step's logits before the request is looked at for errors.
LOOK_SECONDS = 0.2
# How long a cancelled request may take to end: a pass over a long prompt at most.
CANCEL_SECONDS = 60


class Generation(ABC):
    """A request that runs in the executor; it ends where `end` is called or no room is left."""

    def __init__(self, executor: Any):
        self._executor = executor
        self._request_id: int | None = None
        self._final = False

    def start(self, request: Any) -> None:
        """Enqueue the request."""
        self._request_id = self._executor.enqueue_request(request)

    @abstractmethod
    def first(self) -> Floats:
        """Return the logits [vocab] after the prompt.

        Raises:
            VilaDeployError: the executor reports an error.
        """

    @abstractmethod
    def next(self, token: int) -> Floats | None:
        """Return the logits after `token`; None if this request can't go on with it."""

    def end(self) -> None:
        """Cancel the request and wait until the executor has let go of it."""
        if not self._final:
            self._executor.cancel_request(self._request_id)
        while not self._final:
            if not self._responses(CANCEL_SECONDS):
                raise _failure("it does not end a cancelled request")

    def _results(self, seconds: float) -> list[Any]:
        """Return new results, at most `seconds` later; empty if there are none."""
        responses = self._responses(seconds)
        for response in responses:
            if response.has_error():
                raise _failure(response.error_msg)
        return [response.result for response in responses]

    def _responses(self, seconds: float) -> list[Any]:
        # By name: the number of a request alone is taken for a time.
        responses: list[Any] = self._executor.await_responses(
            id=self._request_id, timeout=timedelta(seconds=seconds)
        )
        self._final |= any(r.has_error() or r.result.is_final for r in responses)
        return responses


class SteppedGeneration(Generation):
    """A request whose tokens the caller chooses, for engines of one GPU.

    The executor calls `process_logits` between a pass and its sampler. It waits there for the
    caller's token and leaves the sampler no other.
    """

    def __init__(self, executor: Any, torch: Any):
        super().__init__(executor)
        self._torch = torch
        self._logits: queue.Queue[Floats] = queue.Queue()
        self._tokens: queue.Queue[int | None] = queue.Queue()
        self._ended = threading.Event()

    def process_logits(self, logits: Any, stream: int) -> None:
        """Pass on [1, 1, vocab] and set it so that the caller's token is chosen.

        Args:
            stream: handle of the CUDA stream that computes the logits and reads them afterwards.
        """
        torch = self._torch
        if self._ended.is_set():
            return
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            row = logits.view(-1)
            self._logits.put(row.float().cpu().numpy().copy())
            token = self._tokens.get()
            if token is None:
                return
            row.fill_(torch.finfo(row.dtype).min)
            row[token] = 0

    def first(self) -> Floats:
        logits = self._wait()
        if logits is None:
            raise _failure("it ended without logits")
        return logits

    def next(self, token: int) -> Floats | None:
        self._tokens.put(token)
        return self._wait()

    def end(self) -> None:
        self._ended.set()
        self._tokens.put(None)
        super().end()

    def _wait(self) -> Floats | None:
        while True:
            try:
                return self._logits.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if any(result.is_final for result in self._results(0)):
                    return None


class StreamedGeneration(Generation):
    """A request whose tokens the executor chooses, the most likely ones.

    For engines of several GPUs, whose workers call nothing in this process. The caller's token
    continues it only if it is the executor's own.
    """

    def __init__(self, executor: Any):
        super().__init__(executor)
        self._steps: list[tuple[int, Floats]] = []
        self._chosen: int | None = None

    def first(self) -> Floats:
        logits = self._take()
        if logits is None:
            raise _failure("it ended without logits")
        return logits

    def next(self, token: int) -> Floats | None:
        return self._take() if token == self._chosen else None

    def _take(self) -> Floats | None:
        while not self._steps:
            if self._final:
                return None
            # Not for ever: a wait in its code can't be interrupted.
            for result in self._results(LOOK_SECONDS):
                self._steps += _steps(result)
        self._chosen, logits = self._steps.pop(0)
        return logits


def _steps(result: Any) -> list[tuple[int, Floats]]:
    """Return the tokens and logits of a response: of one step, or of several if it came late."""
    (tokens,) = result.output_token_ids
    if not tokens:
        return []
    logits = result.generation_logits
    if logits is None or len(logits) != len(tokens):
        raise VilaDeployError(
            "TensorRT-LLM gave no logits",
            fix="build the engine again: engines for several GPUs need --gather_generation_logits",
        )
    rows = logits.reshape(len(tokens), -1).float().cpu().numpy()
    return [(token, row.copy()) for token, row in zip(tokens, rows, strict=True)]


def _failure(reason: str) -> VilaDeployError:
    first_line = str(reason).partition("\n")[0]
    return VilaDeployError(
        f"TensorRT-LLM failed ({first_line[:200]})",
        fix="build the engine again with the version that is installed",
    )
