"""Bodies of OpenAI's API for answers: whole ones, and chunks of a stream."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.runtime.request import Finished
from vila_deploy.runtime.token_sampler import TokenLogprob

# OpenAI's API knows no more; "context" is a full slot.
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", "timeout": "length"}
DONE = b"data: [DONE]\n\n"
STILL_WAITING = b": waiting\n\n"  # a comment, which clients skip and proxies count as life


def event(value: dict[str, Any]) -> bytes:
    """Return an event of a stream (text/event-stream)."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def usage(finished: Finished) -> dict[str, Any]:
    """Return how many tokens a request took."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


@dataclass
class AnswerWriter(ABC):
    """Bodies of one answer; a subclass for each endpoint.

    Args:
        special_tokens: names of tokens that stand for no text, for logprobs.
        with_logprobs: whether they were asked for.
        with_usage: whether a stream ends with its usage.
    """

    request_id: str
    model: str
    tokenizer: Tokenizer
    special_tokens: Mapping[int, str]
    with_logprobs: bool = False
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    kind = ""
    chunk_kind = ""

    def whole(self, finished: Finished, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the body of an answer that isn't streamed."""
        choice = self._choice(finished.text, logprobs)
        choice["finish_reason"] = FINISH_REASONS[finished.finish_reason]
        return {**self._head(self.kind), "choices": [choice], "usage": usage(finished)}

    def first(self) -> bytes:
        """Return the events that begin a stream."""
        return b""

    def piece(self, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """Return the event of a piece of text."""
        return self._chunk({**self._delta(text, logprobs), "finish_reason": None})

    def last(self, finished: Finished) -> bytes:
        """Return the events that end a stream."""
        reason = FINISH_REASONS[finished.finish_reason]
        end = self._chunk({**self._delta("", ()), "finish_reason": reason})
        if self.with_usage:
            body = {**self._head(self.chunk_kind), "choices": [], "usage": usage(finished)}
            end += event(body)
        return end + DONE

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.request_id, "object": kind, "created": self.created}
        return {**head, "model": self.model}

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        body = {**self._head(self.chunk_kind), "choices": [choice]}
        if self.with_usage:
            body["usage"] = None
        return event(body)

    @abstractmethod
    def _choice(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the one choice of an answer that isn't streamed."""

    @abstractmethod
    def _delta(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the one choice of a streamed piece of text."""

    def _token(self, number: int) -> tuple[str, bytes]:
        """Return the text of a token, and its bytes; a special one has a name of its own."""
        spelt = self.tokenizer.token_bytes(number)
        if spelt is None:
            name = self.special_tokens.get(number, f"token_id:{number}")
            return name, name.encode()
        return spelt.decode("utf-8", "replace"), spelt


class ChatWriter(AnswerWriter):
    """Bodies of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def first(self) -> bytes:
        choice = self._delta("", ())
        choice["delta"] = {"role": "assistant", "content": ""}
        return self._chunk({**choice, "finish_reason": None})

    def _choice(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": self._logprobs(logprobs)}

    def _delta(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        entries = [
            {
                **self._entry(item.token, item.logprob),
                "top_logprobs": [self._entry(*other) for other in item.top],
            }
            for item in logprobs
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, number: int, logprob: float) -> dict[str, Any]:
        text, spelt = self._token(number)
        return {"token": text, "logprob": logprob, "bytes": list(spelt)}


class CompletionWriter(AnswerWriter):
    """Bodies of /v1/completions; `text_offset` counts from the answer's first character."""

    kind = chunk_kind = "text_completion"
    _offset = 0

    def _choice(self, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": self._logprobs(logprobs)}

    _delta = _choice

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        texts = [self._token(item.token)[0] for item in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [item.logprob for item in logprobs],
            "top_logprobs": [
                {self._token(number)[0]: logprob for number, logprob in item.top}
                for item in logprobs
            ],
            "text_offset": offsets,
        }
