"""What has happened to other servers of such models (CVEs and issues are named), tried on ours."""

from __future__ import annotations

import ast
import base64
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

import vila_deploy
from tests.support.commands import assert_one_line, invoke
from tests.support.internet import PUBLIC, Internet
from tests.support.serving import NAME, Running, asks, data_uri, image_part, serving
from vila_deploy.processing.placeholders import IMAGE_PLACEHOLDERS, VIDEO_PLACEHOLDERS
from vila_deploy.server.options import ServerOptions

CHAT = "/v1/chat/completions"
PACKAGE = Path(vila_deploy.__file__).parent
# What only a library, Python or this computer would say.
FOREIGN = ("Traceback", "PIL", "Error:", "0x", "site-packages", "/tmp", "/home", "line ", "onnx")


class Inside:
    """A service of the inner network, which must not be reached; counts who came."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.visitors = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.visitors += 1
            connection.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def inside() -> Iterator[Inside]:
    service = Inside()
    yield service
    service.close()


@pytest.fixture(scope="module")
def fetching(engine_folder: Path) -> Iterator[Running]:
    """A server that fetches images."""
    with serving(engine_folder, options=ServerOptions((NAME,), allow_image_urls=True)) as running:
        yield running


def ask(server: Running, *parts: Any, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    body = {"messages": messages, "max_tokens": 4, **fields}
    return server.http().post(CHAT, json=body)


def refusal(response: httpx.Response) -> str:
    """Return the message of a request that was refused; it is in our own words."""
    assert response.status_code == 400, response.text
    message = response.json()["error"]["message"]
    for word in FOREIGN:
        assert word not in message, message
    return str(message)


def url_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_addresses_are_not_fetched(server: Running, inside: Inside) -> None:
    """vLLM CVE-2025-6242, LMDeploy CVE-2026-33626, FastChat 3873"""
    for host in ("127.0.0.1", "localhost", "[::1]", "0"):
        response = ask(server, url_part(f"http://{host}:{inside.port}/a.png"))
        assert "--allow-image-urls" in refusal(response)
    assert inside.visitors == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{}/a.png", "http://localhost:{}/", "http://a.org\\@127.0.0.1:{}/",
        "http://127.0.0.1:{}\\@a.org/", "http://user@127.0.0.1:{}/", "http://2130706433:{}/",
        "HTTP://127.0.0.1:{}/", "http://[::ffff:127.0.0.1]:{}/", "https://127.0.0.1:{}/",
    ],
)  # fmt: skip
def test_where_images_are_fetched_this_network_is_not(
    fetching: Running, inside: Inside, url: str
) -> None:
    """vLLM CVE-2026-24779 (backslash), LMDeploy 4761 and vLLM 57157 (see test_remote_images)"""
    refusal(ask(fetching, url_part(url.format(inside.port))))
    assert inside.visitors == 0


def test_addresses_without_a_port_of_their_own(fetching: Running) -> None:
    for host in ("127.0.0.1", "localhost", "169.254.169.254", "[::1]", "10.0.0.1", "0.0.0.0"):
        assert "could not be fetched" in refusal(ask(fetching, url_part(f"http://{host}/a.png")))


def test_a_public_image_is_fetched(engine_folder: Path, images: list[Image.Image]) -> None:
    """What is allowed works: the answer is the one about the image itself."""
    content = base64.b64decode(data_uri(images[0]).partition(",")[2])
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: {len(content)}\r\n\r\n"
    internet = Internet({"a.org": [[PUBLIC]]}, {PUBLIC: head.encode() + content})
    options = ServerOptions((NAME,), allow_image_urls=True)
    with serving(engine_folder, internet.network, options=options) as running:
        fetched = ask(running, url_part("https://a.org/a.png"), max_tokens=24)
        sent = ask(running, image_part(images[0]), max_tokens=24)
    assert internet.connections == [(PUBLIC, 443)]
    assert fetched.status_code == 200, fetched.text
    assert fetched.json()["choices"] == sent.json()["choices"]


def test_links_in_text_are_text(fetching: Running, inside: Inside) -> None:
    """TGI CVE-2026-0599: Markdown images in a prompt were fetched"""
    text = f"![a](http://127.0.0.1:{inside.port}/a.png) http://127.0.0.1:{inside.port}/"
    response = fetching.http().post(CHAT, json={"messages": [asks(text)], "max_tokens": 2})
    assert response.status_code == 200
    assert inside.visitors == 0


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file://localhost/etc/passwd", "/etc/passwd", "etc/passwd",
        "~/.netrc",
        "\\\\host\\a.png", "C:\\a.png", "data:text/plain;base64,AAAA", "data:;base64,AAAA", "",
    ],
)  # fmt: skip
def test_files_are_not_opened(server: Running, fetching: Running, url: str) -> None:
    """SGLang's load_image, FastChat 3873"""
    for running in (server, fetching):
        refusal(ask(running, url_part(url)))


def test_a_file_that_is_an_image_is_not_opened(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    for url in (str(path), f"file://{path}"):
        message = refusal(ask(server, url_part(url)))
        assert str(path) not in message


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "P", "LA"])
def test_odd_images(server: Running, size: tuple[int, int], mode: str) -> None:
    """vLLM CVE-2026-22773: an image of one pixel ended the engine"""
    response = ask(server, image_part(Image.new(mode, size)))
    if response.status_code != 200:
        refusal(response)
    assert server.http().get("/health").status_code == 200


def test_an_image_that_grows(server: Running) -> None:
    """TGI CVE-2026-0599, vLLM CVE-2026-5497: small files of huge images, frames without number"""
    bomb = Image.new("1", (20_000, 20_000))
    assert "megapixels" in refusal(ask(server, image_part(bomb)))
    long = Image.new("L", (1, 60_000))
    response = ask(server, image_part(long))
    assert response.status_code in (200, 400)
    frame = data_uri(Image.new("L", (8, 8)), "JPEG").partition(",")[2]
    frames = "data:video/jpeg;base64," + ",".join([frame] * 10_000)
    video = {"type": "video_url", "video_url": {"url": frames}}
    assert "10000 images and frames" in refusal(ask(server, video))


@pytest.mark.parametrize("name", [*IMAGE_PLACEHOLDERS, *VIDEO_PLACEHOLDERS])
def test_placeholders_typed_as_text(server: Running, name: str) -> None:
    """vLLM CVE-2026-44222: a worker met ids outside of its vocabulary"""
    image = Image.new("RGB", (8, 8))
    messages: list[list[Any]] = [
        [asks(f"{name} What?")],
        [asks(f"{name} What?", image)],
        [{"role": "system", "content": name}, asks("Hi")],
        [{"role": "system", "content": name}, asks("Hi", image)],
    ]
    for conversation in messages:
        body = {"messages": conversation, "max_tokens": 2}
        assert name in refusal(server.http().post(CHAT, json=body))
    response = server.http().post("/v1/completions", json={"prompt": name, "max_tokens": 2})
    assert name in refusal(response)


def test_placeholders_in_an_earlier_answer_are_dropped(server: Running) -> None:
    turn = {"role": "assistant", "content": "<ima<image>ge>"}
    body = {"messages": [asks("Hi"), turn, asks("And?")], "max_tokens": 2}
    response = server.http().post(CHAT, json=body)
    assert response.status_code == 200, response.text
    turn["content"] = ""
    without = server.http().post(CHAT, json=body).json()
    assert response.json()["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]


def test_special_tokens_do_not_end_the_engine(server: Running) -> None:
    for text in ("</s>", "<s>", "<unk>", "<|im_end|>", "<pad>", "\x00", "\u2581", "<0x00>", ""):
        body = {"messages": [asks(text)], "max_tokens": 2}
        assert server.http().post(CHAT, json=body).status_code == 200


def test_errors_are_our_own_words(server: Running) -> None:
    """vLLM CVE-2026-22778: Pillow's text told an address in memory"""
    content = data_uri(Image.new("RGB", (64, 64), "red"))
    for end in (60, 100, 130):
        refusal(ask(server, url_part(content[:end])))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "((("}, {"type": "string", "pattern": "*"},
        {"type": "nothing"},
        {"$ref": "file:///etc/passwd"}, {"$ref": "#/nowhere"}, {"type": 5}, {"enum": "x"},
        {"anyOf": []}, {"properties": 5},
    ],
)  # fmt: skip
def test_schemas_that_are_none(server: Running, schema: dict[str, Any]) -> None:
    """vLLM CVE-2025-48944: a pattern that no regular expression is ended the engine"""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = ask(server, response_format=wanted)
    if response.status_code != 200:
        assert "response_format" in refusal(response)
    assert ask(server).status_code == 200


def imports(folder: str) -> set[str]:
    """Return the first names of all modules that a room imports."""
    names: set[str] = set()
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    return names


def test_nothing_is_unpickled_and_no_template_is_run() -> None:
    """SGLang CVE-2026-3059, -3060 (pickle over ZeroMQ), CVE-2026-5760 (Jinja out of a model)"""
    banned = {"pickle", "marshal", "shelve", "zmq", "jinja2", "torch", "transformers", "yaml"}
    for room in ("server", "runtime"):
        assert not imports(room) & banned
    code = " ".join(path.read_text("utf-8") for path in (PACKAGE / "server").rglob("*.py"))
    assert "eval(" not in code
    assert "exec(" not in code


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "repetition_penalty",
     "top_logprobs", "n", "n_discard", "n_keep", "min_p", "presence_penalty"],
)  # fmt: skip
@pytest.mark.parametrize("value", [-2, -(2**31), -(2**63), -1e30, 2**63, 10**30])
def test_numbers_out_of_bounds(server: Running, name: str, value: float) -> None:
    """llama-server CVE-2026-21869: a negative n_discard wrote out of bounds"""
    assert name in refusal(ask(server, **{name: value}))


def test_an_open_address_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama CVE-2026-7482"""
    monkeypatch.delenv("VILA_API_KEY", raising=False)
    for host in ("0.0.0.0", "::"):
        done = invoke("vila-serve", tmp_path, "--host", host, "--port", 0)
        assert "needs an API key" in assert_one_line(done)
    for key in ("short", "white space in it", "schlüssel-mit-ü"):
        done = invoke("vila-serve", tmp_path, "--api-key", key, "--port", 0)
        assert "an API key has" in assert_one_line(done)


@pytest.mark.parametrize(
    "request_text",
    [
        b"POST /v1/models HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nHost: g\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /%zz%00%ff HTTP/1.1\r\nHost: h\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\r\n\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)  # fmt: skip
def test_wrong_http(server: Running, request_text: bytes) -> None:
    """Triton CVE-2025-23310, -23311: chunks of a body overflowed the stack"""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall(request_text)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert b" 500 " not in answer.partition(b"\r\n")[0]
    assert b"Traceback" not in answer
    assert server.http().get("/health").status_code == 200
