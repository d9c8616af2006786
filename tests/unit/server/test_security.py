"""Keys, hosts, origins and types of bodies."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from vila_deploy.server.errors import ApiError
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.security import Keys, check_json, check_source, host_name, is_loopback

LOCAL = ServerOptions(("m",), hosts=("localhost", "127.0.0.1", "[::1]"))


def status(call: object, *args: object) -> int:
    try:
        call(*args)  # type: ignore[operator]
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Bearer one", 200), ("bearer two", 200), ("Bearer  two", 200), ("Bearer onee", 401),
        ("Bearer on", 401), ("Bearer ", 401), ("Basic one", 401), ("one", 401), ("", 401),
        ("Bearer \udcff", 401), ("Bearer None", 401),
    ],
)  # fmt: skip
def test_keys(header: str, expected: int) -> None:
    raw = [(b"authorization", header.encode("utf-8", "surrogateescape"))]
    assert status(Keys(["one", "two"]).check, Headers(raw=raw)) == expected
    assert status(Keys([]).check, Headers(raw=raw)) == 200


def test_no_key_at_all() -> None:
    assert status(Keys(["one"]).check, Headers({})) == 401


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("LOCALHOST.:1", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("", 403), ("[::2]", 403),
        ("localhost@evil.example", 403),
    ],
)  # fmt: skip
def test_hosts(host: str, expected: int) -> None:
    assert status(check_source, Headers({"host": host}), LOCAL) == expected
    assert status(check_source, Headers({"host": host}), ServerOptions(("m",))) == 200


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8000", 200), ("https://localhost:8000", 200), ("http://a.org", 403),
        ("http://localhost:8001", 403), ("null", 403), ("https://chat.example", 200),
        ("https://chat.example.evil.org", 403),
    ],
)  # fmt: skip
def test_origins(origin: str, expected: int) -> None:
    options = ServerOptions(("m",), cors_origins=("https://chat.example",))
    headers = Headers({"host": "localhost:8000", "origin": origin})
    assert status(check_source, headers, options) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/json", 200), ("Application/JSON; charset=utf-8", 200), ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415), ("multipart/form-data", 415), ("", 415),
    ],
)  # fmt: skip
def test_types_of_bodies(kind: str, expected: int) -> None:
    assert status(check_json, Headers({"content-type": kind})) == expected


def test_names() -> None:
    assert host_name("[::1]:80") == "[::1]"
    assert host_name("A.b:80") == "a.b"
    assert [is_loopback(ip) for ip in ("127.0.0.1", "127.9.9.9", "::1")] == [True] * 3
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "8.8.8.8")))
