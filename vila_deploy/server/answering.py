"""Send an answer as one body or as a stream, and stop when nobody listens any more."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Send

from vila_deploy.runtime.request import Event, Finished, TextPiece
from vila_deploy.runtime.token_sampler import TokenLogprob
from vila_deploy.server.body import ClientGone
from vila_deploy.server.errors import ApiError
from vila_deploy.server.generation import Generation
from vila_deploy.server.openai_responses import DONE, STILL_WAITING, AnswerWriter, event

# A stream begins with its first event, so that what fails before has a status of its own; but
# proxies give up on a server that says nothing for long.
KEEP_ALIVE_S = 15.0
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, or cancel it when the client closes the connection.

    Raises:
        ClientGone: the connection was closed first.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_whole(generation: Generation, writer: AnswerWriter, send: Send) -> None:
    """Send the answer as one JSON body."""
    logprobs: list[TokenLogprob] = []
    while True:
        item = await generation.next_event()
        if isinstance(item, TextPiece):
            logprobs += item.logprobs
        elif isinstance(item, Finished):
            response = JSONResponse(writer.whole(item, logprobs))
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": response.raw_headers})
            await send({"type": "http.response.body", "body": response.body})
            return


async def send_stream(generation: Generation, writer: AnswerWriter, send: Send) -> None:
    """Send the answer piece by piece, as server-sent events.

    Raises:
        ApiError: the request failed before anything was sent; later that is an event.
    """
    stream = _Stream(send)
    try:
        while True:
            item = await _next_event(generation)
            if not stream.begun:
                await stream.write(writer.first())
            if isinstance(item, TextPiece):
                await stream.write(writer.piece(item.text, item.logprobs))
            elif isinstance(item, Finished):
                await stream.write(writer.last(item), end=True)
                return
            elif item is None:
                await stream.write(STILL_WAITING)
    except ApiError as error:
        if not stream.begun:
            raise
        await stream.write(event(error.body()) + DONE, end=True)


async def _next_event(generation: Generation) -> Event | None:
    """Return the next event, or None where none comes for long."""
    try:
        async with asyncio.timeout(KEEP_ALIVE_S):
            return await generation.next_event()
    except TimeoutError:
        return None


class _Stream:
    """A response that begins with the first bytes written."""

    def __init__(self, send: Send):
        self._send, self.begun = send, False

    async def write(self, content: bytes, end: bool = False) -> None:
        if not self.begun:
            self.begun = True
            start = {"type": "http.response.start", "status": 200}
            await self._send({**start, "headers": STREAM_HEADERS})
        await self._send({"type": "http.response.body", "body": content, "more_body": not end})
