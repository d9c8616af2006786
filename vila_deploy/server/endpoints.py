"""The endpoints that ask the model, as ASGI applications: those hear of clients that go away."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.runtime.prompt import Prompt
from vila_deploy.runtime.request import GenerationRequest
from vila_deploy.server.answering import send_stream, send_whole, until_disconnect
from vila_deploy.server.api import Api
from vila_deploy.server.body import ClientGone, Reservation, read_body
from vila_deploy.server.errors import ApiError
from vila_deploy.server.generation import Generation, shutting_down
from vila_deploy.server.guard import REQUEST_ID
from vila_deploy.server.openai_responses import AnswerWriter, ChatWriter, CompletionWriter
from vila_deploy.server.openai_schema import (
    ChatRequest,
    CompletionRequest,
    GenerationOptions,
    parse_chat,
    parse_completion,
    parse_json,
)
from vila_deploy.server.security import check_json

# For a client to take what has been written for it.
SEND_GRACE_S = 60.0


@dataclass(frozen=True)
class _Prepared:
    """What is left of a request while it is answered: its body and images are gone."""

    options: GenerationOptions
    request: GenerationRequest


class GenerationEndpoint(ABC):
    """An endpoint that asks the model; `param` is the field that holds the prompt."""

    param: str
    id_prefix: str
    writer: type[AnswerWriter]

    def __init__(self, api: Api):
        self.api = api

    @abstractmethod
    def parse(self, body: bytes) -> ChatRequest | CompletionRequest:
        """Return the request in a body."""

    @abstractmethod
    def prompt(self, request: Any) -> Coroutine[Any, Any, Prompt]:
        """Return the prompt of what `parse` returned."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.api.draining:
            raise shutting_down()
        headers, arrived = Headers(scope=scope), time.monotonic()
        check_json(headers)
        limits = self.api.options.limits
        with self.api.budget.reserve() as reservation:
            # The body has no name here: it would be kept until the answer has ended.
            preparing = self._prepare(
                await read_body(headers, receive, limits, reservation), arrived
            )
            answer = self._answer(preparing, reservation, scope[REQUEST_ID], send)
            await until_disconnect(receive, answer)

    async def _prepare(self, body: bytes, arrived: float) -> _Prepared:
        limits = self.api.options.limits
        try:
            async with asyncio.timeout(limits.timeout_s):
                parsed = await self.api.prompts.in_thread(self.parse, body)
                self.api.model_name(parsed.options.model)
                return await self._request(parsed, arrived)
        except TimeoutError:
            raise ApiError(
                f"the request was not read within {limits.timeout_s:g} s", status=408
            ) from None

    async def _request(self, parsed: ChatRequest | CompletionRequest, arrived: float) -> _Prepared:
        options, limits = parsed.options, self.api.options.limits
        constraint = None
        if options.response_format is not None:
            make = self.api.structured_output.constraint
            constraint = await self.api.prompts.in_thread(make, options.response_format.schema)
        room = self.api.engine.session.max_seq_len
        sampling = SamplingParams(
            max_new_tokens=min(options.max_tokens or room, limits.max_tokens or room, room),
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
        )
        prompt = await self.prompt(parsed)
        request = GenerationRequest(
            prompt,
            sampling,
            stop=options.stop,
            logprobs=options.logprobs,
            constraint=constraint,
            ignore_stop_tokens=options.ignore_eos,
            deadline_s=max(0.0, limits.timeout_s - (time.monotonic() - arrived)),
        )
        return _Prepared(options, request)

    async def _answer(
        self,
        preparing: Coroutine[Any, Any, _Prepared],
        reservation: Reservation,
        request_id: str,
        send: Send,
    ) -> None:
        prepared = await preparing
        reservation.release()
        options, api = prepared.options, self.api
        writer = self.writer(
            f"{self.id_prefix}-{request_id}",
            api.model_name(options.model),
            api.tokenizer,
            api.special_tokens,
            with_logprobs=options.logprobs is not None,
            with_usage=options.include_usage,
        )
        generation = Generation(
            api.scheduler, prepared.request, api.metrics, request_id, self.param
        )
        answer = send_stream if options.stream else send_whole
        try:
            async with generation, asyncio.timeout(api.options.limits.timeout_s + SEND_GRACE_S):
                await answer(generation, writer, send)
        except TimeoutError:
            # The client keeps the connection, but reads nothing.
            raise ClientGone from None


class ChatEndpoint(GenerationEndpoint):
    """/v1/chat/completions"""

    param, id_prefix, writer = "messages", "chatcmpl", ChatWriter

    def parse(self, body: bytes) -> ChatRequest:
        return parse_chat(parse_json(body), self.api.options.ignore_tools)

    def prompt(self, request: ChatRequest) -> Coroutine[Any, Any, Prompt]:
        return self.api.prompts.chat(request)


class CompletionEndpoint(GenerationEndpoint):
    """/v1/completions"""

    param, id_prefix, writer = "prompt", "cmpl", CompletionWriter

    def parse(self, body: bytes) -> CompletionRequest:
        return parse_completion(parse_json(body))

    def prompt(self, request: CompletionRequest) -> Coroutine[Any, Any, Prompt]:
        return self.api.prompts.completion(request)
