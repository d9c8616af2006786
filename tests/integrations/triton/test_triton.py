"""Our engine in Triton's own server: streams equal answers, metrics count them."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import REPOSITORY, TINY_VILA
from vila_deploy import SamplingParams, build_engine, open_engine
from vila_deploy.integrations.triton.repository import write_repository

VENV = Path(os.environ.get("TRITON_VENV", ".venv-triton"))
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = VENV.absolute() / "lib" / f"python{PYTHON}" / "site-packages"
IMAGE = TINY_VILA.parent / "pictures" / "three.png"
QUESTION, START_S = "Describe the picture.", 300

pytestmark = [
    pytest.mark.skipif(
        not (SITE / "pytriton").is_dir(), reason="needs nvidia-pytriton: make test-triton"
    ),
    pytest.mark.timeout(600),
]


@dataclass(frozen=True)
class Server:
    """Addresses of a running server."""

    http: str
    metrics: str

    def generate(self, path: str = "generate_stream", **inputs: Any) -> list[dict[str, Any]]:
        """Return the responses to one request."""
        request = urllib.request.Request(
            f"{self.http}/v2/models/vila/{path}",
            json.dumps(inputs).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        if path == "generate":
            return [json.loads(text)]
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]

    def requests_done(self) -> int:
        with urllib.request.urlopen(self.metrics, timeout=30) as answer:
            text = answer.read().decode()
        return int(re.findall(r'nv_inference_request_success\{model="vila"[^}]*\} (\d+)', text)[0])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "tiny"
    build_engine(TINY_VILA, out, target="cpu", precision="fp16")
    return out


@pytest.fixture(scope="module")
def expected(engine: Path) -> str:
    with open_engine(engine) as opened:
        answer = opened.chat().ask(QUESTION, images=[IMAGE], sampling=SamplingParams(64))
    return answer.text


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    write_repository(engine, folder / "models")
    triton = SITE / "pytriton" / "tritonserver"
    shutil.copytree(triton / "backends", folder / "backends")
    stub = triton / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    shutil.copy(stub, folder / "backends" / "python")
    http, grpc, metrics = free_ports(3)
    environment = os.environ | {
        "PYTHONPATH": f"{SITE}:{REPOSITORY}",
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{SITE / 'nvidia_pytriton.libs'}",
    }
    command = [
        triton / "bin" / "tritonserver", "--disable-auto-complete-config",
        f"--model-repository={folder / 'models'}", f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc}", "--metrics-address=127.0.0.1", f"--metrics-port={metrics}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found = Server(f"http://127.0.0.1:{http}", f"http://127.0.0.1:{metrics}/metrics")
            wait_until_ready(process, found, folder / "log")
            yield found
        finally:
            process.terminate()
            process.wait(60)


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def wait_until_ready(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{server.http}/v2/health/ready", timeout=10) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(1)
    pytest.fail(log.read_text()[-3000:])


def body(**more: Any) -> dict[str, Any]:
    image = base64.b64encode(IMAGE.read_bytes()).decode()
    return {"text_input": QUESTION, "image": image, "max_tokens": 64, **more}


def joined(responses: list[dict[str, Any]]) -> str:
    return "".join(response["text_output"] for response in responses)


def test_a_stream_is_the_answer_in_pieces(server: Server, expected: str) -> None:
    responses = server.generate(**body())
    assert joined(responses).strip() == expected
    assert len(responses) > 2
    assert responses[-1]["finish_reason"] == "stop"
    assert not any(response["finish_reason"] for response in responses[:-1])


def test_one_response_where_no_stream_is_wanted(server: Server, expected: str) -> None:
    (response,) = server.generate("generate", **body(stream=False))
    assert response["text_output"].strip() == expected


def test_many_at_once_are_answered_alike_and_counted(server: Server, expected: str) -> None:
    before = server.requests_done()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: joined(server.generate(**body())).strip(), range(16)))
    assert answers == [expected] * 16
    assert server.requests_done() == before + 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_input": "What is <image>?"}, "which marks the place of an image"),
        ({"image": "!!"}, "image 0: is neither an image file nor base64"),
        ({"image": "aGVsbG8="}, "image 0: is not an image"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_a_bad_request_gets_one_line_and_hurts_nobody(
    server: Server, expected: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.generate("generate", **body(stream=False, **changes))
    assert message in json.loads(caught.value.read())["error"]
    assert joined(server.generate(**body())).strip() == expected
