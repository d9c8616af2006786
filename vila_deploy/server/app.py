"""The ASGI application: routes, and what surrounds them."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vila_deploy.server.api import Api
from vila_deploy.server.endpoints import ChatEndpoint, CompletionEndpoint
from vila_deploy.server.errors import ApiError
from vila_deploy.server.forwarding import ForwardingApi
from vila_deploy.server.guard import Guard
from vila_deploy.server.page_files import page_routes

_STATUS = {404: "no such path", 405: "not with this method"}


# Of an engine in this process, or of a server that runs one.
ServedApi = Api | ForwardingApi


def create_app(api: ServedApi) -> Starlette:
    """Return the application that answers for `api`."""
    chat, completion = _endpoints(api)
    routes = [
        *page_routes(),
        Route("/health", api.health, methods=["GET"]),
        Route("/metrics", api.show_metrics, methods=["GET"]),
        Route("/v1/models", api.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.show_model, methods=["GET"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
    ]
    paths = frozenset(route.path for route in routes if "{" not in route.path)
    middleware = [Middleware(Guard, options=api.options, metrics=api.metrics, paths=paths)]
    if api.options.cors_origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=api.options.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            ),
        )
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _refuse}
    )
    app.router.redirect_slashes = False
    return app


def _endpoints(api: ServedApi) -> tuple[ASGIApp, ASGIApp]:
    """Return what answers /v1/chat/completions and /v1/completions."""
    if isinstance(api, ForwardingApi):
        return api.chat_endpoint, api.completion_endpoint
    return ChatEndpoint(api), CompletionEndpoint(api)


def _refuse(request: Request, error: Exception) -> Response | Awaitable[Response]:
    """Give Starlette's own refusals the form of all others."""
    assert isinstance(error, HTTPException)
    what = _STATUS.get(error.status_code, "refused")
    raise ApiError(
        what,
        status=error.status_code,
        fix="see /v1/chat/completions and /v1/models",
        allow=(error.headers or {}).get("Allow"),
    )
