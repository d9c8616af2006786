"""A server in front of another: the same answers and errors; the other one is ours here."""

from __future__ import annotations

import socket
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest
from PIL import Image

from tests.support.forwarding import Front, forwarding
from tests.support.serving import ENDLESS, KEY, NAME, Running, asks, serving, wait_until
from vila_deploy.server.options import RequestLimits, ServerOptions

Images = list[Image.Image]
QUESTION = "Describe the picture."


@pytest.fixture(scope="module")
def front(server: Running) -> Iterator[Front]:
    with forwarding(server.url) as running:
        yield running


def create(running: Front | Running, messages: list[Any], **fields: Any) -> Any:
    options = {"max_tokens": 40, **fields}
    return running.openai().chat.completions.create(model=NAME, messages=messages, **options)


def test_answers_are_the_other_servers(front: Front, server: Running, images: Images) -> None:
    for messages in ([asks(QUESTION, images[0])], [asks("Which has more?", *images[:2])]):
        expected, found = create(server, messages), create(front, messages)
        assert found.choices[0].message.content == expected.choices[0].message.content
        assert found.usage.total_tokens == expected.usage.total_tokens
        assert found.model == NAME


def test_streams(front: Front, images: Images) -> None:
    messages = [asks(QUESTION, images[0])]
    whole = create(front, messages).choices[0].message.content
    chunks = list(create(front, messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens > 1
    assert len(chunks) > 5


def test_completions(front: Front, server: Running) -> None:
    texts = [
        running.openai().completions.create(model=NAME, prompt="The circle is", max_tokens=8)
        for running in (front, server)
    ]
    assert texts[0].choices[0].text == texts[1].choices[0].text


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 400, "a list of 1 to"),
        ({"messages": [asks("What is <image>?")]}, 400, "holds <image>"),
        ({"messages": [asks("x")], "model": "y"}, 404, "no such model"),
        ({"messages": [asks("x")], "chat_template": "{{ 1 }}"}, 400, "is no field"),
        ({"messages": [asks("x ")] * 1500}, 400, "a list of 1 to"),
        # Found by the other server.
        ({"messages": [asks("circle " * 3000)]}, 400, "tokens"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}]},
            400, "fetches no images",
        ),
    ],
)  # fmt: skip
def test_errors(front: Front, body: dict[str, Any], status: int, message: str) -> None:
    response = front.http().post("/v1/chat/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_frees_the_other_server(front: Front, server: Running) -> None:
    stream = create(front, [asks("x")], stream=True, response_format=ENDLESS, max_tokens=None)
    next(iter(stream))
    assert server.metric("num_requests_running") == 1
    stream.close()
    wait_until(lambda: server.metric("num_requests_running") == 0)


def test_page_health_models_and_metrics(front: Front) -> None:
    http = front.http()
    assert "<html" in http.get("/").text
    assert http.get("/health").json() == {"status": "ok"}
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (NAME, 2048)
    figures = http.get("/metrics").text
    assert 'vila:http_responses_total{path="/health",status="200"}' in figures
    assert "vila:num_requests_running" in figures, "the other server's"


def test_limits_and_keys_are_the_front_s(server: Running, images: Images) -> None:
    limits = RequestLimits(images=1, max_tokens=2, image_pixels=100_000)
    options = ServerOptions((NAME,), api_keys=(KEY,), limits=limits)
    with forwarding(server.url, options) as front:
        assert front.http().get("/v1/models").status_code == 401
        answer = create(front, [asks(QUESTION, images[0])])
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (2, "length")
        with pytest.raises(openai.BadRequestError, match="at most 1"):
            create(front, [asks(QUESTION, *images[:2])])
        with pytest.raises(openai.BadRequestError, match=r"larger than 0\.1 megapixels"):
            create(front, [asks(QUESTION, Image.new("1", (1000, 101)))])
        for broken in (b"x", b"\x89PNG\r\n\x1a\n"):
            part = {"url": "data:image/png;base64," + b64encode(broken).decode()}
            message = {"role": "user", "content": [{"type": "image_url", "image_url": part}]}
            with pytest.raises(openai.BadRequestError, match="not an image that can be read"):
                create(front, [message])


def test_the_other_servers_key_is_sent(engine_folder: Path) -> None:
    options = ServerOptions((NAME,), api_keys=(KEY,))
    with serving(engine_folder, slots=1, options=options) as behind:
        with forwarding(behind.url, upstream_key=KEY) as front:
            assert create(front, [asks("x")]).choices
        with forwarding(behind.url, upstream_key="wrong-key") as front:
            response = front.http().post("/v1/chat/completions", json={"messages": [asks("x")]})
            assert response.status_code == 500
            assert "API key" not in response.text


def test_a_closed_connection_is_tried_once_more() -> None:
    """The first connection is closed without an answer, as a server does with one that idled."""
    body = b'{"choices": []}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_the_second() -> None:
            for content in (b"", answer % len(body) + body):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(content)

        thread = Thread(target=answer_the_second, daemon=True)
        thread.start()
        with forwarding(f"http://127.0.0.1:{listener.getsockname()[1]}") as front:
            response = front.http().post("/v1/chat/completions", json={"messages": [asks("x")]})
        assert (response.status_code, response.content) == (200, body)
        thread.join(60)


def test_nobody_answers_behind() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with forwarding(f"http://127.0.0.1:{taken.getsockname()[1]}") as front:
            response = front.http().post("/v1/chat/completions", json={"messages": [asks("x")]})
            assert response.status_code == 503
            assert "does not answer" in response.json()["error"]["message"]
            assert front.http().get("/health").status_code == 503
            assert front.http().get("/metrics").status_code == 200
