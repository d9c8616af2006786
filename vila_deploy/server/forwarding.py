"""Answer by way of another server of OpenAI's API, such as vLLM: same page, same fields, same keys.

A request is read and checked as one for our own engines is; what goes on to the other server is
made of its known fields alone. Its errors come back in our form, its answers as they are.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vila_deploy.processing.placeholders import check_no_placeholders
from vila_deploy.server.answering import STREAM_HEADERS, until_disconnect
from vila_deploy.server.body import BodyBudget, ClientGone, Reservation, read_body
from vila_deploy.server.errors import ApiError, internal, refused
from vila_deploy.server.generation import shutting_down
from vila_deploy.server.guard import REQUEST_ID
from vila_deploy.server.images import count_pixels, data_uri_bytes
from vila_deploy.server.metrics import MEDIA_TYPE, ServerMetrics
from vila_deploy.server.model_listing import ModelListing
from vila_deploy.server.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS
from vila_deploy.server.openai_schema import (
    ChatRequest,
    CompletionRequest,
    GenerationOptions,
    ImagePart,
    parse_chat,
    parse_completion,
    parse_json,
)
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.prompts import check_image_count, is_address, no_fetching
from vila_deploy.server.remote_images import Network, fetch_image
from vila_deploy.server.security import check_json
from vila_deploy.utils.errors import VilaDeployError, printable

CONNECT_TIMEOUT_S = 5.0
# Less than the 5 s after which uvicorn, and so vLLM, closes a connection that nobody uses.
KEEP_ALIVE_S = 2.0
# What the other server says is wrong with a request; the rest are faults of its own.
TOLD = (400, 404, 413, 415, 422, 429)
MAX_MESSAGE = 500
MAX_ERROR_BYTES = 1 << 16


class ForwardingApi(ModelListing):
    """The endpoints of a server whose answers another one makes.

    `draining` is set when the server is to end: new requests are refused from then on.

    Args:
        upstream: address of the other server, without /v1.
        upstream_key: its API key; None if it has none.
        network: how image URLs are fetched, where `options` allow it.
    """

    def __init__(
        self,
        upstream: str,
        options: ServerOptions,
        max_model_len: int,
        upstream_key: str | None = None,
        network: Network | None = None,
    ):
        super().__init__(options, max_model_len)
        self.draining = False
        self.metrics = ServerMetrics(options.model_names[0], None)
        self.budget = BodyBudget(options.body_bytes_in_flight)
        self.network = (network or Network()) if options.allow_image_urls else None
        self._upstream = upstream
        self._headers = {"authorization": f"Bearer {upstream_key}"} if upstream_key else {}
        self._client: httpx.AsyncClient | None = None
        self.chat_endpoint = ForwardedEndpoint(self, "/v1/chat/completions", _chat_body)
        self.completion_endpoint = ForwardedEndpoint(self, "/v1/completions", _completion_body)

    @property
    def client(self) -> httpx.AsyncClient:
        """The connections to the other server; made in the event loop that uses them."""
        if self._client is None:
            timeout = httpx.Timeout(self.options.limits.timeout_s, connect=CONNECT_TIMEOUT_S)
            limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S)
            self._client = httpx.AsyncClient(
                base_url=self._upstream,
                headers=self._headers,
                timeout=timeout,
                limits=limits,
                trust_env=False,
            )
        return self._client

    async def health(self, request: Request) -> Response:
        """Answer 200 while the other server does."""
        try:
            healthy = (await self._get("/health")).status_code == 200
        except httpx.HTTPError:
            healthy = False
        if self.draining or not healthy:
            return JSONResponse({"status": "unavailable"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """Answer with our figures, and behind them the other server's."""
        try:
            theirs = (await self._get("/metrics")).content
        except httpx.HTTPError:
            theirs = b""
        return Response(self.metrics.exposition() + theirs, media_type=MEDIA_TYPE)

    async def _get(self, path: str) -> httpx.Response:
        return await self.client.get(path, timeout=CONNECT_TIMEOUT_S)

    async def drain(self) -> None:
        """Return at once: uvicorn waits for requests that run."""

    def close(self) -> None:
        """Do nothing: connections end with the event loop."""


class ForwardedEndpoint:
    """An ASGI application that has another server answer.

    Args:
        body: makes what is sent on of what came.
    """

    def __init__(
        self, api: ForwardingApi, path: str, body: Callable[[bytes, ServerOptions], _Forwarded]
    ):
        self._api, self._path, self._body = api, path, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._api.draining:
            raise shutting_down()
        headers = Headers(scope=scope)
        check_json(headers)
        with self._api.budget.reserve() as reservation:
            content = await read_body(headers, receive, self._api.options.limits, reservation)
            # Bodies of many megabytes are read and written in a thread.
            forwarded = await asyncio.to_thread(self._body, content, self._api.options)
            del content
            answer = self._forward(forwarded, reservation, scope[REQUEST_ID], send)
            try:
                async with asyncio.timeout(self._api.options.limits.timeout_s):
                    await until_disconnect(receive, answer)
            except TimeoutError:
                raise _too_slow() from None

    async def _forward(
        self, forwarded: _Forwarded, reservation: Reservation, request_id: str, send: Send
    ) -> None:
        self._api.model_name(forwarded.options.model)
        await self._fetch_images(forwarded)
        body = await asyncio.to_thread(forwarded.encode)
        async with self._ask(body, request_id) as response:
            reservation.release()
            if response.status_code != 200:
                raise await _error(response, request_id)
            kind = response.headers.get("content-type", "application/json")
            headers = STREAM_HEADERS
            if not kind.startswith("text/event-stream"):
                headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for chunk in response.aiter_bytes():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except httpx.HTTPError:
                # Without its last message the connection is closed: half an answer shows.
                raise ClientGone from None
        await send({"type": "http.response.body", "body": b""})

    @asynccontextmanager
    async def _ask(self, body: bytes, request_id: str) -> AsyncIterator[httpx.Response]:
        headers = {"content-type": "application/json", "x-request-id": request_id}
        client = self._api.client
        request = client.build_request("POST", self._path, content=body, headers=headers)
        try:
            try:
                response = await client.send(request, stream=True)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # A kept connection that the other server closed meanwhile.
                response = await client.send(request, stream=True)
        except httpx.TimeoutException:
            raise _too_slow() from None
        except httpx.HTTPError:
            raise ApiError(
                "the model's server does not answer", status=503, retry_after_s=5
            ) from None
        try:
            yield response
        finally:
            await response.aclose()

    async def _fetch_images(self, forwarded: _Forwarded) -> None:
        """Check the images, and put those that have an address into the request itself."""
        network, limits = self._api.network, self._api.options.limits
        if not isinstance(forwarded.request, ChatRequest):
            return
        check_image_count(forwarded.request.images, limits)
        pixels_left = 2 * limits.image_pixels
        for image in forwarded.request.images:
            content = None
            if is_address(image):
                if network is None:
                    raise no_fetching(image)
                content = await fetch_image(image.url, image.param, limits.body_bytes, network)
                forwarded.replace(image.url, base64.b64encode(content).decode())
            most = min(limits.image_pixels, pixels_left)
            pixels_left -= await asyncio.to_thread(_pixels, image, content, most)


def _pixels(image: ImagePart, content: bytes | None, max_pixels: int) -> int:
    """Return the pixels of an image, whose bytes are in the request where `content` is None."""
    if content is None:
        content = data_uri_bytes(image.url, image.param)
    return count_pixels(content, image.param, max_pixels)


class _Forwarded:
    """A checked request, and what is sent on of it."""

    def __init__(self, request: ChatRequest | CompletionRequest, values: dict[str, Any]):
        self.request, self.values = request, values

    @property
    def options(self) -> GenerationOptions:
        return self.request.options

    def encode(self) -> bytes:
        """Return the body that is sent on."""
        return json.dumps(self.values).encode()

    def replace(self, url: str, content: str) -> None:
        """Give the parts with an address the image's bytes instead."""
        for message in self.values["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                holder = part.get("image_url")
                if holder == url or (isinstance(holder, dict) and holder.get("url") == url):
                    part["image_url"] = {"url": f"data:image/png;base64,{content}"}


def _chat_body(content: bytes, options: ServerOptions) -> _Forwarded:
    fields = parse_json(content)
    request = parse_chat(fields, options.ignore_tools)
    for message in request.messages:
        _refuse_placeholders("messages", *(part for part in message.parts if isinstance(part, str)))
    values = {key: value for key, value in fields.values.items() if key in CHAT_FIELDS}
    return _Forwarded(request, _with_defaults(values, request.options, options))


def _completion_body(content: bytes, options: ServerOptions) -> _Forwarded:
    fields = parse_json(content)
    request = parse_completion(fields)
    _refuse_placeholders("prompt", request.prompt)
    values = {key: value for key, value in fields.values.items() if key in COMPLETION_FIELDS}
    return _Forwarded(request, _with_defaults(values, request.options, options))


def _refuse_placeholders(param: str, *texts: str) -> None:
    try:
        for text in texts:
            check_no_placeholders(text)
    except VilaDeployError as error:
        raise refused(error, param) from None


def _with_defaults(
    values: dict[str, Any], asked: GenerationOptions, options: ServerOptions
) -> dict[str, Any]:
    """Return the fields with our defaults for those left out, and our limits."""
    values = {key: value for key, value in values.items() if value is not None}
    values.pop("max_completion_tokens", None)
    values["model"] = asked.model or options.model_names[0]
    values |= {
        "temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k,
        "repetition_penalty": asked.repetition_penalty, "stream": asked.stream,
    }  # fmt: skip
    limit = options.limits.max_tokens
    most = [number for number in (asked.max_tokens, limit) if number is not None]
    if most:
        values["max_tokens"] = min(most)
    return values


def _too_slow() -> ApiError:
    return ApiError("the model did not answer in time", status=408)


async def _error(response: httpx.Response, request_id: str) -> ApiError:
    """Return the problem that the other server names, if it is the request's."""
    if response.status_code not in TOLD:
        return internal(request_id)
    content = b""
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_ERROR_BYTES:
            return internal(request_id)
    try:
        error = json.loads(content)["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, TypeError, KeyError, AttributeError):
        return internal(request_id)
    status = response.status_code if response.status_code in (404, 413, 415, 429) else 400
    return ApiError(
        printable(message)[:MAX_MESSAGE],
        status=status,
        param=param if isinstance(param, str) else None,
    )
