"""Read the body of a request within limits of size and time, one request's and all requests'."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Receive

from vila_deploy.server.errors import ApiError
from vila_deploy.server.options import RequestLimits


class ClientGone(Exception):
    """The client has closed the connection: nobody waits for an answer."""


class BodyBudget:
    """Bytes that all bodies together may take while they are read and decoded."""

    def __init__(self, max_bytes: int):
        self.free_bytes = max_bytes

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """Hand out a reservation that grows with a body and is given back whole."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.release()


class Reservation:
    """The part of a budget that one body takes."""

    def __init__(self, budget: BodyBudget):
        self._budget, self.size_bytes = budget, 0

    def grow(self, size_bytes: int) -> None:
        """Take more bytes.

        Raises:
            ApiError: the budget has no more.
        """
        if size_bytes > self._budget.free_bytes:
            raise ApiError(
                "the server reads as much as it can hold already", status=429, retry_after_s=1
            )
        self._budget.free_bytes -= size_bytes
        self.size_bytes += size_bytes

    def release(self) -> None:
        """Give all bytes back: they are no longer held."""
        self._budget.free_bytes += self.size_bytes
        self.size_bytes = 0


async def read_body(
    headers: Headers, receive: Receive, limits: RequestLimits, reservation: Reservation
) -> bytes:
    """Return the whole body.

    Raises:
        ApiError: it is larger than allowed, or too slow.
        ClientGone: the connection was closed before its end.
    """
    declared = headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit() or int(declared) > limits.body_bytes:
        raise _too_large(limits.body_bytes)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limits.body_bytes:
                    raise _too_large(limits.body_bytes)
                reservation.grow(len(chunk))
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(
            f"the body did not arrive within {limits.body_timeout_s:g} s", status=408
        ) from None


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        f"the body is larger than {max_bytes / 1e6:g} MB",
        status=413,
        code="body_too_large",
        fix="send smaller or fewer images",
    )
