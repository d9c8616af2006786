"""SGLang's server starts from our folder as it is, and computes what our reference computes."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sglang", reason="needs SGLang: make test-integrations")

from tests.support.sglang_cases import LITE, make_nvila
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.images import place_features
from vila_deploy.processing.multimodal_prompt import merge_embeddings
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.prompt import Message, prepare_prompt
from vila_deploy.utils.arrays import Floats
from vila_deploy.writers.convert import convert

STAND_IN = Path(__file__).parent / "stand_in"
CASES = {"lite": LITE}
# Log-probabilities: float16 in SGLang, float32 in our reference.
TOLERANCE = 0.005
START_S, QUESTION = 600, "What is it?"
FLAGS = [
    "--trust-remote-code", "--device", "cpu", "--attention-backend", "torch_native",
    "--sampling-backend", "pytorch", "--disable-overlap-schedule", "--disable-cuda-graph",
    "--skip-server-warmup", "--mem-fraction-static", "0.3", "--max-total-tokens", "8192",
    "--host", "127.0.0.1",
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_nvila(path / "three", **CASES[request.param])
    convert(path / "three", path / "one", ["sglang"])
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The address of a server of the folder."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(STAND_IN),
    }  # fmt: skip
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder / "one")]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), *FLAGS], env=environment, stdout=log, stderr=log
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait(server, address, folder / "log")
            yield address
        finally:
            server.terminate()
            server.wait(60)


def wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return
        except OSError:
            time.sleep(2)
    pytest.fail(log.read_text()[-3000:])


def ask(url: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    body = {
        "model": "vila", "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": 1, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def image_part(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def reference(folder: Path, images: list[Image.Image]) -> tuple[Floats, int]:
    """Return our log-probabilities of the first token, and the prompt's length."""
    checkpoint = open_checkpoint(folder / "three")
    tokenizer = load_tokenizer(folder / "three" / "llm")
    model = ModelInfo.from_config(checkpoint.config, tokenizer)
    prompt = prepare_prompt([Message("user", (*images, QUESTION))], model, tokenizer)
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
    return shifted - np.log(np.exp(shifted).sum()), len(prompt)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shapes", [[(1, 1)], [(2, 1)], [(3, 2)], [(1, 7)], [(1, 1), (2, 1)], []])
def test_log_probabilities(folder: Path, url: str, shapes: list[tuple[int, int]]) -> None:
    tile = open_checkpoint(folder / "three").config.tiling.tile
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 255, (h * tile, w * tile, 3), dtype=np.uint8))
        for w, h in shapes
    ]
    expected, length = reference(folder, images)
    answer = ask(url, [*map(image_part, images), {"type": "text", "text": QUESTION}])
    assert answer["usage"]["prompt_tokens"] == length
    (token,) = answer["choices"][0]["logprobs"]["content"]
    found = sorted((row["logprob"] for row in token["top_logprobs"]), reverse=True)
    assert np.abs(np.sort(expected)[::-1][:5] - found).max() < TOLERANCE
