"""Follow one request from the event loop, while the engine's thread answers it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from vila_deploy.runtime.request import Event, Failed, Finished, GenerationRequest
from vila_deploy.runtime.scheduler import QueueFull, Scheduler, ShuttingDown
from vila_deploy.server.errors import ApiError, internal, refused
from vila_deploy.server.metrics import ServerMetrics
from vila_deploy.utils.errors import VilaDeployError

LOG = logging.getLogger(__name__)


class Generation:
    """A submitted request; `async with` cancels what has not ended by itself.

    Raises:
        ApiError: the queue is full, the server shuts down, or the prompt is too long.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        request: GenerationRequest,
        metrics: ServerMetrics,
        request_id: str,
        param: str,
    ):
        self._request_id = request_id
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_event(event: Event) -> None:
            metrics.observe(event)
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            self._ticket = scheduler.submit(request, on_event)
        except QueueFull as error:
            raise ApiError(
                error.what, status=429, code="queue_full", retry_after_s=error.retry_after_s
            ) from None
        except ShuttingDown:
            raise shutting_down() from None
        except VilaDeployError as error:
            # Nothing else is wrong with a request that was checked.
            raise refused(error, param, "context_length_exceeded") from None

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ticket.cancel()

    async def next_event(self) -> Event:
        """Return the next piece of text, or the end.

        Raises:
            ApiError: the request failed, or was ended because the server shuts down.
        """
        event = await self._events.get()
        if isinstance(event, Failed):
            if isinstance(event.error, ApiError):
                raise event.error
            LOG.error("%s failed: %s", self._request_id, event.error, exc_info=event.error)
            raise internal(self._request_id)
        if isinstance(event, Finished) and event.finish_reason == "cancelled":
            raise shutting_down()
        if isinstance(event, Finished) and event.finish_reason == "timeout" and not event.tokens:
            raise ApiError(
                "no token came within the time that this server allows",
                status=503,
                code="timeout",
                retry_after_s=10,
            )
        return event

    async def events(self) -> AsyncIterator[Event]:
        """Yield all events; the last one is `Finished`. Raises as `next_event` does."""
        while True:
            event = await self.next_event()
            yield event
            if isinstance(event, Finished):
                return


def shutting_down() -> ApiError:
    """Return what clients hear while the server ends."""
    return ApiError(
        "the server is shutting down",
        status=503,
        code="shutting_down",
        fix="ask again when it has restarted",
        retry_after_s=10,
    )
