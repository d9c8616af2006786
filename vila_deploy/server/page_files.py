"""The files of the page, read once; nothing else of the disk is served."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}


def page_routes() -> list[Route]:
    """Return a route for each file of the page."""
    folder = files("vila_deploy.server") / "page"
    return [
        _route(path, (folder / name).read_bytes(), media_type)
        for path, (name, media_type) in FILES.items()
    ]


def _route(path: str, content: bytes, media_type: str) -> Route:
    async def respond(request: Request) -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return Route(path, respond, methods=["GET"])
