"""vila-serve as a process: signals while answers run, TLS, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.commands import assert_one_line, invoke
from tests.support.served_process import Streams, process
from tests.support.serving import ENDLESS, KEY, asks, wait_until
from vila_deploy.cli import serve

LONG: dict[str, Any] = {"messages": [asks("Hi")], "response_format": ENDLESS}


def test_sigterm_lets_eight_streams_end(engine_folder: Path) -> None:
    with process(engine_folder) as server:
        streams = Streams(server.url, [{**LONG, "max_tokens": 300}] * 8)
        wait_until(lambda: all(streams.texts))
        assert server.stop(signal.SIGTERM) == 0
        streams.join()
        assert streams.broken == 0
        assert all(text.endswith("data: [DONE]\n\n") for text in streams.texts)
        assert all('"finish_reason": "length"' in text for text in streams.texts)
        assert "waiting for 8 requests to end" in server.stderr


def test_streams_that_cannot_end_in_time_are_told(engine_folder: Path) -> None:
    with process(engine_folder, "--drain-timeout", "0.2", "--slots", "2") as server:
        streams = Streams(server.url, [{**LONG, "max_tokens": 1900}] * 8)
        wait_until(lambda: requests_inside(server.url) == 8)
        assert server.stop(signal.SIGINT) == 0
        streams.join()
        assert streams.broken == 0
        for status, text in zip(streams.statuses, streams.texts, strict=True):
            assert status in (200, 503)
            assert "the server is shutting down" in text
            assert text.endswith("data: [DONE]\n\n") or status == 503


def test_a_second_signal_ends_at_once(engine_folder: Path) -> None:
    with process(engine_folder) as server:
        streams = Streams(server.url, [{**LONG, "max_tokens": 1900}] * 8)
        wait_until(lambda: requests_inside(server.url) == 8)
        server.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server.url))
        assert server.stop(signal.SIGTERM) == 128 + signal.SIGTERM
        streams.join()
        assert streams.broken > 0, "answers were not waited for"


def requests_inside(url: str) -> int:
    """Return how many requests run or wait."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("vila:num_requests_running", "vila:num_requests_waiting")
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(names)))


def refuses(url: str) -> bool:
    """Return whether nothing listens any more."""
    address = httpx.URL(url)
    try:
        socket.create_connection((address.host, address.port), timeout=5).close()
    except OSError:
        return True
    return False


def test_tls_and_key(engine_folder: Path, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    keys = tmp_path / "keys.txt"
    keys.write_text(f"\n{KEY}\n", "utf-8")
    options = ["--tls-cert", certificate, "--tls-key", key, "--api-key-file", keys]
    with process(engine_folder, *options, "--model-name", "vila", VILA_API_KEY="another-key") as it:
        assert it.started.startswith("vila answers at https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(certificate))
        for header in (KEY, "another-key"):
            headers = {"Authorization": f"Bearer {header}"}
            models = httpx.get(f"{it.url}/v1/models", headers=headers, verify=context).json()
            assert models["data"][0]["id"] == "vila"
        assert httpx.get(f"{it.url}/v1/models", verify=context).status_code == 401
        # With a key the server may be known under any name.
        named = {"Host": "vila.example"}
        assert httpx.get(f"{it.url}/health", headers=named, verify=context).status_code == 200
        assert it.stop() == 0
        assert it.stderr == ""


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Return files of a certificate for 127.0.0.1 and its key."""
    import subprocess

    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=a",
         "-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def fails(*options: object, folder: Path) -> str:
    return assert_one_line(invoke("vila-serve", folder, "--port", 0, *options))


def test_wrong_options_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VILA_API_KEY", raising=False)
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    cases: list[tuple[list[object], str]] = [
        ([], "manifest.json"),
        (["--host", "no.such.name.invalid"], "can't listen there"),
        (["--host", "192.0.2.1"], "can't listen there"),
        (["--host", "a" * 300], "can't listen there"),
        (["--api-key-file", tmp_path / "none"], "no such file"),
        (["--api-key-file", tmp_path / "empty"], "holds no key"),
        (["--api-key-file", tmp_path / "binary"], "is not UTF-8"),
        (["--api-key-file", "/dev/zero"], "is larger than 1048576 bytes"),
        (["--cors-origin", "*"], "is no origin"),
        (["--cors-origin", "chat.example"], "is no origin"),
        (["--cors-origin", "https://a.org/path"], "is no origin"),
        (["--model-name", " "], "is no name"),
        (["--model-name", "a\nb"], "is no name"),
        (["--tls-cert", tmp_path / "none", "--tls-key", tmp_path / "none"], "no such file"),
        (["--tls-cert", tmp_path / "empty", "--tls-key", tmp_path / "empty"], "is no certificate"),
    ]
    for options, message in cases:
        assert message in fails(*options, folder=tmp_path)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("nowhere", "circle"):
        assert "no such folder" in fails(folder=tmp_path / name)


def test_a_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    assert serve._names((), folder) == ("\\xdce9",)
    assert serve._names((), Path("/")) == ("vila",)
    assert serve._names(("a", "b"), folder) == ("a", "b")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = invoke("vila-serve", tmp_path, "--port", port)
    assert f"127.0.0.1:{port}: can't listen there" in assert_one_line(done)


def test_usage(tmp_path: Path) -> None:
    assert invoke("vila-serve", tmp_path, "--tls-cert", tmp_path).returncode == 2
    for option in ("--port", "--slots", "--queue-size", "--timeout", "--max-body-mb"):
        assert invoke("vila-serve", tmp_path, option, -1).returncode == 2
        assert invoke("vila-serve", tmp_path, option, "nan").returncode == 2


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    done = invoke("vila-serve", tmp_path)
    assert "pip install '.[serve]'" in assert_one_line(done)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from vila_deploy.cli.serve import main;"
        "print(sorted({'numpy', 'torch', 'starlette', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
