"""Open WebUI's requests are answered, and its way of reading streams finds what it looks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.support import open_webui
from tests.support.serving import NAME, Running, serving
from vila_deploy.server.options import ServerOptions

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(engine_folder: Path) -> Iterator[Running]:
    """A server as docs/serving.md starts it for Open WebUI."""
    with serving(engine_folder, options=ServerOptions((NAME,), ignore_tools=True)) as running:
        yield running


def read_stream(response: httpx.Response) -> tuple[str, dict[str, Any]]:
    """Return text and usage, found line by line as Open WebUI's middleware does."""
    assert "text/event-stream" in response.headers["content-type"]
    text, usage = "", {}
    lines = response.text.splitlines()
    assert lines[-2] == "data: [DONE]"
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            assert line in ("", "data: [DONE]")
            continue
        chunk = json.loads(line.removeprefix("data: "))
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
    return text, usage


@pytest.mark.parametrize("headers", open_webui.HEADERS)
def test_list_of_models(server: Running, headers: dict[str, str]) -> None:
    models = server.http().get("/v1/models", headers=headers).json()
    assert [model["id"] for model in models["data"]] == [NAME]


@pytest.mark.parametrize("headers", open_webui.HEADERS)
def test_chat(server: Running, headers: dict[str, str], images: list[Image.Image]) -> None:
    http = server.http(headers=headers)
    text, usage = read_stream(http.post(CHAT, json=open_webui.chat(images[0])))
    assert text
    assert usage["completion_tokens"] > 0
    again = open_webui.chat(images[0], **open_webui.PARAMETERS)
    assert read_stream(http.post(CHAT, json=again))[0] == text
    following, usage = read_stream(http.post(CHAT, json=open_webui.follow_up(images[0], text)))
    assert following
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] // 2
    reply = http.post(CHAT, json=open_webui.title(text)).json()
    assert reply["choices"][0]["message"]["content"]


def test_wrong_parameters_are_named(server: Running, images: list[Image.Image]) -> None:
    body = open_webui.chat(images[0], frequency_penalty=0.5)
    response = server.http().post(CHAT, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "frequency_penalty"
