"""What surrounds every request: who may ask, headers, counts, and a last answer to any fault."""

from __future__ import annotations

import logging
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vila_deploy.server.body import ClientGone
from vila_deploy.server.errors import ApiError, internal
from vila_deploy.server.metrics import ServerMetrics
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.security import SECURITY_HEADERS, WITHOUT_KEY, Keys, check_source

LOG = logging.getLogger(__name__)
REQUEST_ID = "vila_deploy.request_id"  # in the scope
OTHER_PATH = "other"


class Guard:
    """ASGI middleware; errors below it become answers in OpenAI's form.

    Args:
        paths: those counted by name.
    """

    def __init__(
        self, app: ASGIApp, options: ServerOptions, metrics: ServerMetrics, paths: frozenset[str]
    ):
        self._app, self._options, self._metrics, self._paths = app, options, metrics, paths
        self._keys = Keys(options.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID] = secrets.token_hex(12)
        begun = False

        async def send_guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._count(scope, message["status"])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_guarded)
        except ClientGone:
            return
        except ApiError as error:
            problem = error
        except Exception as error:
            LOG.error("%s failed", request_id, exc_info=error)
            problem = internal(request_id)
        else:
            return
        if begun:
            # Without its last message the server closes the connection: half an answer must not
            # look like a whole one.
            return
        response = JSONResponse(problem.body(), problem.status, problem.headers)
        await response(scope, receive, send_guarded)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        check_source(headers, self._options)
        if scope["path"] not in WITHOUT_KEY:
            self._keys.check(headers)

    def _count(self, scope: Scope, status: int) -> None:
        path = scope["path"] if scope["path"] in self._paths else OTHER_PATH
        self._metrics.count_response(path, status)
