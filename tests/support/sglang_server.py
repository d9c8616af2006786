"""SGLang's server on a CPU in a process of its own, and what it says of a chat."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import REPOSITORY
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.images import place_features
from vila_deploy.processing.multimodal_prompt import merge_embeddings
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.prompt import Message, prepare_prompt
from vila_deploy.utils.arrays import Floats

# Stands for kernels that SGLang has for GPUs only.
STAND_IN = REPOSITORY / "tests" / "integrations" / "sglang" / "stand_in"
START_S, ANSWER_S, TOP = 900, 1500, 5
# A free port may be another program's before SGLang opens it.
PORTS, TAKEN = 3, "address already in use"
FLAGS = [
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup",
    "--mem-fraction-static", "0.95", "--max-total-tokens", "8192", "--host", "127.0.0.1",
    # Else it ends itself when a pass takes 5 minutes, as on a computer that others use too.
    "--watchdog-timeout", "3600",
]  # fmt: skip


@contextmanager
def sglang_server(log: Path, *options: str) -> Iterator[str]:
    """Yield the address of a server that has started.

    Args:
        log: file for what it says.
        options: of SGLang, the model's path among them.
    """
    path = os.pathsep.join(filter(None, (str(STAND_IN), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path,
    }  # fmt: skip
    for _ in range(PORTS):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        arguments = ["-m", "sglang.launch_server", "--port", str(port), *FLAGS, *options]
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=output, stderr=output
            )
            try:
                address = f"http://127.0.0.1:{port}"
                if _started(server, address, log):
                    yield address
                    return
            finally:
                server.terminate()
                server.wait(60)
    pytest.fail(f"{PORTS} ports in turn were taken by others")


def _started(server: subprocess.Popen[bytes], address: str, log: Path) -> bool:
    """Wait until it answers; return False if another program has taken its port meanwhile."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            said = log.read_text()
            assert TAKEN in said, said[-3000:]
            return False
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return True
        except OSError:
            time.sleep(2)
    pytest.fail(log.read_text()[-3000:])


def ask(address: str, messages: list[dict[str, Any]]) -> tuple[list[float], int]:
    """Return the largest log-probabilities of the first token, falling, and the prompt's length.

    Raises:
        urllib.error.HTTPError: the server refuses.
    """
    body = {
        "model": "vila", "messages": messages, "temperature": 0, "max_tokens": 1,
        "logprobs": True, "top_logprobs": TOP,
    }  # fmt: skip
    answer = post(f"{address}/v1/chat/completions", body)
    (token,) = answer["choices"][0]["logprobs"]["content"]
    found = sorted((row["logprob"] for row in token["top_logprobs"]), reverse=True)
    return found, answer["usage"]["prompt_tokens"]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return what the server answers to JSON."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def image_part(image: Image.Image) -> dict[str, Any]:
    """Return an image as a part of a message."""
    file = io.BytesIO()
    image.save(file, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def reference(root: Path, messages: Sequence[Message]) -> tuple[Floats, int]:
    """Return our largest log-probabilities of the first token, falling, and the prompt's length."""
    checkpoint = open_checkpoint(root)
    tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
    model = ModelInfo.from_config(checkpoint.config, tokenizer)
    prompt = prepare_prompt(messages, model, tokenizer)
    session = ReferenceSession(checkpoint)
    features: list[Floats] = []
    for image in prompt.images:
        tiles, grid = image.pixels.tiles, image.pixels.grid
        groups = [tiles] if grid else [tile[None] for tile in tiles]
        encoded = [session.encode_images(group, grid) for group in groups]
        rows = [each.reshape(-1, each.shape[-1]) for each in encoded]
        features += place_features(rows, image.pixels)
    embeds = merge_embeddings(prompt.chunks, features, session.embed_tokens)
    logits = session.prefill(embeds).astype(np.float64)
    shifted = logits - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    return np.sort(logprobs)[::-1][:TOP], len(prompt)
