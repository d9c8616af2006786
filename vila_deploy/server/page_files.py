"""The files of the page, read once; nothing else of the disk is served."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = files("vila_deploy.server") / "page"
_INDEX = "index.html"
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}


def _names() -> dict[str, str]:
    """Return the page's files by the path that each is served at."""
    names = sorted(file.name for file in _FOLDER.iterdir() if _ending(file.name) in _TYPES)
    return {"/" if name == _INDEX else f"/{name}": name for name in names}


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


PAGE_FILES = _names()


def page_routes() -> list[Route]:
    """Return a route for each file of the page."""
    return [_route(path, *read_page_file(path)) for path in PAGE_FILES]


def read_page_file(path: str) -> tuple[bytes, str]:
    """Return the bytes of the file at a path of `PAGE_FILES`, and its media type."""
    name = PAGE_FILES[path]
    return (_FOLDER / name).read_bytes(), f"{_TYPES[_ending(name)]}; charset=utf-8"


def _route(path: str, content: bytes, media_type: str) -> Route:
    async def respond(request: Request) -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return Route(path, respond, methods=["GET"])
