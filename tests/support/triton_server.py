"""Triton's own server, out of nvidia-pytriton, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import REPOSITORY

VENV = Path(os.environ.get("TRITON_VENV", ".venv-triton"))
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = VENV.absolute() / "lib" / f"python{PYTHON}" / "site-packages"
START_S = 300
needs_triton = [
    pytest.mark.skipif(
        not (SITE / "pytriton").is_dir(), reason="needs nvidia-pytriton: make test-triton"
    ),
    pytest.mark.timeout(900),
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

    def requests_done(self, model: str = "vila") -> int:
        """Return how many requests to a model have been answered."""
        with urllib.request.urlopen(self.metrics, timeout=30) as answer:
            text = answer.read().decode()
        pattern = rf'nv_inference_request_success\{{model="{model}"[^}}]*\}} (\d+)'
        return int(re.findall(pattern, text)[0])


@contextmanager
def triton_server(
    folder: Path, models: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Yield a server that is ready.

    Args:
        folder: for its log and a copy of its backends.
        models: the model repository.
        variables: more of its environment.
    """
    triton = SITE / "pytriton" / "tritonserver"
    shutil.copytree(triton / "backends", folder / "backends")
    stub = triton / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    shutil.copy(stub, folder / "backends" / "python")
    http, grpc, metrics = _free_ports(3)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SITE}:{REPOSITORY}",
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{SITE / 'nvidia_pytriton.libs'}",
        **(variables or {}),
    }
    command = [
        triton / "bin" / "tritonserver", "--disable-auto-complete-config",
        f"--model-repository={models}", f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc}", "--metrics-address=127.0.0.1", f"--metrics-port={metrics}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found = Server(f"http://127.0.0.1:{http}", f"http://127.0.0.1:{metrics}/metrics")
            _wait_until_ready(process, found, folder / "log")
            yield found
        finally:
            process.terminate()
            process.wait(60)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
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


def joined(responses: list[dict[str, Any]]) -> str:
    """Return the text of all pieces."""
    return "".join(response["text_output"] for response in responses)
