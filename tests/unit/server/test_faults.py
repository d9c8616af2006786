"""Faults of the engine and of ours: one request ends, in our words, and the log says more."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import httpx
import pytest

from tests.support.serving import ENDLESS, NAME, Running, asks
from vila_deploy.server import answering, prompts

CHAT = "/v1/chat/completions"
SECRET = "/secret/path at 0x7f00"
HI: dict[str, Any] = {"messages": [asks("Hi")], "max_tokens": 8}


def ask(server: Running, **fields: Any) -> httpx.Response:
    return server.http().post(CHAT, json={**HI, **fields})


def fail(*_: object, **__: object) -> None:
    raise RuntimeError(SECRET)


def check_500(response: httpx.Response, log: pytest.LogCaptureFixture) -> None:
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    assert SECRET not in response.text
    request_id = response.headers["x-request-id"]
    assert request_id in error["message"]
    (record,) = log.records
    assert request_id in record.getMessage()
    assert record.exc_info
    assert SECRET in logging.Formatter().format(record)


def test_the_engine_fails(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(server.engine.session, "prefill", fail)
        check_500(ask(server), caplog)
    assert ask(server).status_code == 200
    errors = server.metric("request_success_total", finished_reason="error")
    assert errors == server.api.scheduler.stats().ended["error"]


def test_code_of_ours_fails(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(prompts, "prepare_prompt", fail)
        check_500(ask(server), caplog)
    assert ask(server).status_code == 200


@pytest.mark.usefixtures("caplog")
def test_a_stream_fails_in_the_middle(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = server.engine.session.decode, 0

    def fail_later(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return decode(*args) if calls < 4 else fail()

    with monkeypatch.context() as patched:
        patched.setattr(server.engine.session, "decode", fail_later)
        response = ask(server, stream=True, response_format=ENDLESS)
    assert response.status_code == 200, "it had begun"
    *pieces, error, done = [line for line in response.text.splitlines() if line]
    assert len(pieces) > 2
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert done == "data: [DONE]"
    assert SECRET not in response.text
    assert ask(server).status_code == 200


def test_a_long_silence_is_filled(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "KEEP_ALIVE_S", 0.05)
    prefill, heard = server.engine.session.prefill, threading.Event()

    def slowly(*args: Any, **options: Any) -> Any:
        assert heard.wait(60), "nothing came"
        return prefill(*args, **options)

    monkeypatch.setattr(server.engine.session, "prefill", slowly)
    text = ""
    with server.http().stream("POST", CHAT, json={**HI, "stream": True}) as response:
        for piece in response.iter_text():
            text += piece
            if text.count(": waiting\n\n") >= 2:
                heard.set()
    assert text.endswith("data: [DONE]\n\n")
    heard.clear()
    threading.Timer(0.3, heard.set).start()
    chunks = server.openai().chat.completions.create(model=NAME, stream=True, **HI)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")


def test_many_schemas_at_once_with_one_that_is_none(server: Running) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "bogus"}}}
    for stream in (False, True):
        response = ask(server, response_format=wanted, stream=stream)
        assert response.status_code == 400, "before a stream begins"
        assert response.json()["error"]["param"] == "response_format.json_schema.schema"
