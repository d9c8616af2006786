"""Keys, hosts, bodies and queues over HTTP, and the headers of every answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from tests.support.serving import (
    ENDLESS,
    KEY,
    NAME,
    Running,
    asks,
    image_part,
    serving,
    wait_until,
)
from vila_deploy.server import protocol
from vila_deploy.server.body import Reservation
from vila_deploy.server.errors import ApiError
from vila_deploy.server.options import RequestLimits, ServerOptions
from vila_deploy.server.security import CONTENT_SECURITY_POLICY

CHAT = "/v1/chat/completions"
HI = {"messages": [asks("Hi")], "max_tokens": 4}
TIGHT = ServerOptions(
    (NAME, "other-name"),
    api_keys=(KEY,),
    cors_origins=("https://chat.example",),
    body_bytes_in_flight=50_000,
    limits=RequestLimits(body_bytes=20_000, image_pixels=1000, images=2, max_tokens=3),
)
HASTY = ServerOptions((NAME,), limits=RequestLimits(timeout_s=1.0))
HASTY_READER = ServerOptions((NAME,), limits=RequestLimits(body_timeout_s=0.3))


@pytest.fixture(scope="module")
def tight(engine_folder: Path) -> Iterator[Running]:
    with serving(engine_folder, options=TIGHT) as running:
        yield running


def post(server: Running, body: Any, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}", **options.pop("headers", {})}
    return server.http().post(CHAT, json=body, headers=headers, **options)


def error(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, which has OpenAI's form."""
    assert set(response.json()) == {"error"}
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_a_key_is_asked_for_all_but_health_and_page(tight: Running) -> None:
    http = tight.http()
    for path in ("/", "/app.js", "/style.css", "/health"):
        assert http.get(path).status_code == 200
    for path in ("/metrics", "/v1/models", f"/v1/models/{NAME}", "/v1/nothing", "/nothing"):
        response = http.get(path)
        assert response.status_code == 401
        assert error(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert http.post(CHAT, json=HI).status_code == 401
    assert post(tight, HI).status_code == 200
    assert post(tight, HI, headers={"Authorization": "Bearer wrong-key"}).status_code == 401


def test_headers_of_every_answer(tight: Running) -> None:
    http = tight.http()
    for response in (http.get("/"), http.get("/nothing"), http.get("/health"), post(tight, HI)):
        assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-request-id"]
        assert "server" not in response.headers


def test_hosts_of_a_server_without_key(server: Running) -> None:
    guarded = replace(server.api.options, hosts=("127.0.0.1",))
    with serving(server.engine.folder, options=guarded) as running:
        assert running.http().get("/health").status_code == 200
        response = running.http().get("/health", headers={"Host": "rebound.example"})
        assert response.status_code == 403
        assert error(response)["code"] == "wrong_host"


def test_other_pages_are_refused_but_for_those_allowed(tight: Running) -> None:
    evil = {"Origin": "https://evil.example"}
    assert post(tight, HI, headers=evil).status_code == 403
    allowed = post(tight, HI, headers={"Origin": "https://chat.example"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    http = tight.http()
    preflight = http.options(CHAT, headers={"Origin": "https://chat.example", **asked})
    assert preflight.status_code == 200
    assert http.options(CHAT, headers={**evil, **asked}).status_code == 400


def test_without_cors_no_page_elsewhere_is_answered(server: Running) -> None:
    origin = {"Origin": "https://chat.example"}
    response = server.http().post(CHAT, json=HI, headers=origin)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


def test_a_form_cannot_send_requests(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = server.http().post(CHAT, content=json.dumps(HI), headers={"Content-Type": kind})
        assert response.status_code == 415


def test_large_bodies(tight: Running) -> None:
    large = json.dumps({**HI, "user": "x" * 20_000}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    response = tight.http().post(CHAT, content=large, headers=headers)
    assert response.status_code == 413
    assert error(response)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    assert tight.http().post(CHAT, content=chunks(), headers=headers).status_code == 413


def test_many_bodies_at_once(tight: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, refused, grow = threading.Barrier(5), threading.Event(), Reservation.grow

    def grow_or_refuse(reservation: Reservation, size_bytes: int) -> None:
        try:
            grow(reservation, size_bytes)
        except ApiError:
            refused.set()
            raise

    monkeypatch.setattr(Reservation, "grow", grow_or_refuse)

    def slowly(number: int) -> int:
        def chunks() -> Iterator[bytes]:
            yield b" " * 15_000
            reading.wait(60)
            assert refused.wait(60)
            yield json.dumps(HI).encode()

        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return tight.http().post(CHAT, content=chunks(), headers=headers).status_code

    with ThreadPoolExecutor(5) as threads:
        statuses = sorted(threads.map(slowly, range(5)))
    assert statuses[:3] == [200] * 3
    assert 429 in statuses
    assert tight.api.budget.free_bytes == TIGHT.body_bytes_in_flight


def test_images_within_limits(tight: Running) -> None:
    def status(*images: Image.Image) -> tuple[int, str | None]:
        response = post(tight, {**HI, "messages": [asks("What?", *images)]})
        return response.status_code, None if response.is_success else error(response)["code"]

    small, large = Image.new("RGB", (30, 30)), Image.new("RGB", (32, 32))
    assert status(small, small) == (200, None)
    assert status(large) == (400, "image_too_large")
    assert status(small, small, small) == (400, "too_many_images")
    frames = ",".join(["AA=="] * 3)
    video = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    response = post(tight, {"messages": [{"role": "user", "content": [video]}]})
    assert error(response)["code"] == "too_many_images"


def test_tokens_are_limited(tight: Running) -> None:
    body = {**HI, "response_format": ENDLESS, "max_tokens": 1000}
    assert post(tight, body).json()["usage"]["completion_tokens"] == 3
    assert post(tight, {**body, "max_tokens": 2}).json()["usage"]["completion_tokens"] == 2


def test_model_names(tight: Running) -> None:
    models = tight.openai().models.list().data
    assert [model.id for model in models] == [NAME, "other-name"]
    assert post(tight, {**HI, "model": "other-name"}).json()["model"] == "other-name"
    assert post(tight, HI).json()["model"] == NAME
    response = post(tight, {**HI, "model": "gpt-5"})
    assert response.status_code == 404
    assert error(response)["code"] == "model_not_found"


def test_long_prompts(server: Running) -> None:
    response = server.http().post(CHAT, json={"messages": [asks("word " * 3000)]})
    assert response.status_code == 400
    assert error(response)["code"] == "context_length_exceeded"


def test_texts_that_cannot_fit_are_not_tokenized(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(text: str) -> list[int]:
        raise AssertionError("long texts take long")

    monkeypatch.setattr(server.api.tokenizer, "encode", encode)
    text = "é日 " * 1_000_000
    for path, body in ((CHAT, {"messages": [asks(text)]}), ("/v1/completions", {"prompt": text})):
        response = server.http().post(path, json=body)
        assert response.status_code == 400
        assert error(response)["code"] == "context_length_exceeded"


def test_paths_and_methods(server: Running) -> None:
    http = server.http()
    assert http.get("/v1/embeddings").status_code == 404
    assert http.get(CHAT).status_code == 405
    refused = http.post("/health")
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD"}
    assert http.get("/../../etc/passwd").status_code == 404
    assert http.get("/page/index.html").status_code == 404
    for path in ("/v1/embeddings", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/%2e%2e"):
        assert error(http.get(path))["type"] == "not_found_error"


@pytest.fixture(scope="module")
def slow(engine_folder: Path) -> Iterator[Running]:
    """A server whose answers take long, with room for one request beside those that run."""
    with serving(engine_folder, slots=2, queue_size=1, pause_s=0.05) as running:
        yield running


def test_a_full_queue_says_when_to_come_back(slow: Running) -> None:
    body = {"messages": [asks("Hi")], "response_format": ENDLESS, "max_tokens": 60}
    with ThreadPoolExecutor(3) as threads:
        answers = []
        for number in range(3):
            answers.append(threads.submit(post, slow, body))
            wait_until(lambda: sum(_load(slow)) == number + 1)  # noqa: B023
        refused = post(slow, body)
        assert refused.status_code == 429
        assert error(refused)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        for answer in answers:
            assert answer.result().json()["usage"]["completion_tokens"] == 60


def _load(server: Running) -> tuple[int, int]:
    stats = server.api.scheduler.stats()
    return stats.running, stats.waiting


@pytest.fixture(scope="module")
def hasty(engine_folder: Path) -> Iterator[Running]:
    """A server whose answers take longer than it allows."""
    with serving(engine_folder, slots=1, options=HASTY, pause_s=0.05) as running:
        yield running


def test_an_answer_ends_when_its_time_is_over(hasty: Running) -> None:
    body = {"messages": [asks("Hi")], "response_format": ENDLESS, "max_tokens": 1000}
    response = post(hasty, body)
    if response.is_success:
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"].startswith("[")
    else:
        assert error(response)["code"] == "timeout", "on a busy computer"


def test_no_token_within_the_time(hasty: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = hasty.engine.session.prefill

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(1.2)
        return prefill(*args, **options)

    monkeypatch.setattr(hasty.engine.session, "prefill", slowly)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda _: post(hasty, HI), range(2)))
    late = [response for response in answers if not response.is_success]
    assert late
    for response in late:
        assert response.status_code == 503
        assert error(response)["code"] == "timeout"
        assert int(response.headers["retry-after"])


def test_slow_bodies(engine_folder: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    headers = {"Content-Type": "application/json"}
    with serving(engine_folder, slots=1, options=HASTY_READER) as hasty:
        assert hasty.http().post(CHAT, content=chunks(), headers=headers).status_code == 408
        assert hasty.api.budget.free_bytes == HASTY_READER.body_bytes_in_flight


def test_an_image_beside_text_has_its_place_in_errors(tight: Running) -> None:
    part = image_part(Image.new("RGB", (4, 4)))
    part["image_url"]["url"] += "!"
    response = post(tight, {"messages": [{"role": "user", "content": [part]}]})
    assert error(response)["param"] == "messages[0].content[0].image_url"


def connect(server: Running) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=10)


def test_a_head_that_never_ends(tight: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(tight) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.4)
        connection.sendall(b"GET /health")
        assert ends(connection, b"/")
    for sent in (b"", b"GET /health HTTP/1.1\r\nX: "):
        with connect(tight) as connection:
            connection.sendall(sent)
            assert ends(connection, b"y" if sent else b"")


def ends(connection: socket.socket, more: bytes) -> bool:
    """Return whether the server closes a connection on which it gets a byte now and then."""
    connection.settimeout(0.1)
    for _ in range(600):
        try:
            connection.sendall(more)
            if connection.recv(100) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def test_a_slow_answer_is_not_a_slow_head(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**HI, "response_format": ENDLESS, "max_tokens": 12}
    with slow.http() as http:
        http.get("/health")
        # On a connection in use the time begins with the first byte of a head, which comes whole.
        monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
        assert http.post(CHAT, json=body).status_code == 200


def test_connections_are_limited(tight: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = tight.server.server_state.connections
    most = len(connections) + 5
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", most)
    held = [connect(tight) for _ in range(20)]
    wait_until(lambda: len(connections) == most)
    for connection in held:
        connection.close()
    wait_until(lambda: len(connections) <= most - 5)
    assert tight.http().get("/health").status_code == 200
