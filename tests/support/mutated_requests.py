"""Requests of every kind, damaged at random; equal seeds do equal damage."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tests.support import open_webui
from tests.support.mutate import change_value, dump_json
from tests.support.serving import NAME, asks, image_part

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Request:
    """What is sent; `damage` says how it differs from a good request."""

    path: str
    body: bytes
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    damage: str = ""


def good_requests() -> list[tuple[str, dict[str, Any]]]:
    """Return requests of every kind that are answered."""
    image = Image.new("RGB", (12, 10), "red")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    frame = image_part(image)["image_url"]["url"].partition(",")[2]
    video = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frame},{frame}"}}
    turns = [asks("What?", image), {"role": "assistant", "content": "A"}, asks("And?", image)]
    few = {"model": NAME, "max_tokens": 3}
    return [
        (CHAT, {**few, "messages": [asks("Hi")], "stop": ["x"], "seed": 1, "temperature": 0.5}),
        (CHAT, {**few, "messages": turns, "logprobs": True, "top_logprobs": 2, "stream": True}),
        (CHAT, {**few, "messages": [asks("Hi")], "response_format": wanted}),
        (CHAT, {**few, "messages": [{"role": "user", "content": [video]}]}),
        (CHAT, {**open_webui.chat(image, **open_webui.PARAMETERS), "max_tokens": 3, "tools": []}),
        (COMPLETIONS, {**few, "prompt": "USER: What", "logprobs": 1, "top_p": 0.9}),
    ]


def damaged_request(rng: random.Random) -> Request:
    """Return a request with some damage."""
    path, values = copy.deepcopy(rng.choice(good_requests()))
    kind = rng.choice(("value", "value", "value", "bytes", "text", "headers", "path"))
    if kind == "value":
        times = range(rng.choice((1, 1, 2, 5)))
        damage = ", ".join(change_value(values, rng) for _ in times if values)
        return Request(path, dump_json(values).encode("utf-8", "surrogatepass"), damage=damage)
    request = Request(path, json.dumps(values).encode(), damage=kind)
    if kind == "bytes":
        request.body = _damaged_bytes(request.body, rng)
    elif kind == "text":
        request.body = _damaged_image(request.body, rng)
    elif kind == "headers":
        name, value = rng.choice(HEADERS)
        request.headers[name] = value
        request.damage = f"{name}: {value[:40]}"
    else:
        request.path, request.method = rng.choice(PATHS), rng.choice(METHODS)
        request.damage = f"{request.method} {request.path[:60]}"
    return request


HEADERS = (
    ("content-type", "text/plain"), ("content-type", "application/json; charset=utf-16"),
    ("content-encoding", "gzip"), ("authorization", "Bearer " + "x" * 5000), ("origin", "null"),
    ("host", "evil.example"), ("host", ""), ("cookie", "a=b"), ("expect", "100-continue"),
    ("accept", "text/html"), ("content-type", ""), ("origin", "http://\\"), ("x-a", "\xff"),
    ("range", "bytes=0-"), ("te", "trailers"), ("connection", "close"), ("authorization", "\t"),
)  # fmt: skip
PATHS = (
    "/", "/v1", "/v1/", "/v1/models/", "/v1/models/x/y", "//v1/models", "/v1/chat/completions/",
    "/metrics", "/health", "/app.js", "/%00", "/%2e%2e/x", "/v1/models/%ff",
    "/v1/models?a=" + "b" * 999,
    "/" + "a/" * 500, "/V1/MODELS", "/v1/chat/completions?x=<script>", "/favicon.ico", "*",
)  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "QUERY")


def _damaged_bytes(body: bytes, rng: random.Random) -> bytes:
    content = bytearray(body)
    for _ in range(rng.choice((1, 2, 20))):
        at = rng.randrange(len(content) + 1)
        kind = rng.choice(("flip", "delete", "insert", "repeat", "cut"))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "delete":
            del content[at : at + rng.randint(1, 20)]
        elif kind == "insert":
            content[at:at] = rng.randbytes(rng.randint(1, 20))
        elif kind == "repeat":
            content[at:at] = content[at : at + 50] * 3
        else:
            del content[at + 1 :]
    return bytes(content)


def _damaged_image(body: bytes, rng: random.Random) -> bytes:
    """Change characters of base64, so that images are damaged and JSON is not."""
    content, start = bytearray(body), body.find(b"base64,")
    if start < 0:
        return _damaged_bytes(body, rng)
    for _ in range(rng.choice((1, 3, 30))):
        at = start + 7 + rng.randrange(150)
        if at < len(content) and chr(content[at]).isalnum():
            content[at] = ord(rng.choice("ABCxyz059+/=!"))
    return bytes(content)
