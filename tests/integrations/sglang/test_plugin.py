"""VILA1.5, which SGLang has no class for, by our plugin in SGLang's server."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sglang", reason="needs SGLang: make test-integrations")

from tests.support.commands import succeed
from tests.support.openai_messages import as_openai
from tests.support.sglang_server import ask, post, reference, sglang_server
from tests.support.tiny import make_checkpoint
from tests.support.vllm_cases import CASES, questions

TOLERANCE = 0.005


def half(path: Path) -> Path:
    """As VILA1.5-3b, in fp16."""
    return make_checkpoint(path / "c", **CASES["Llama"])


def quantized(path: Path) -> Path:
    """As Llama-3-VILA1.5-8B, quantized by our command."""
    root = make_checkpoint(path / "c", **CASES["Llama-3"])
    succeed("vila-quantize", root, "-o", path / "q", "--algorithm", "rtn", "--group-size", 64,
            "--no-eval", "--format", "awq")  # fmt: skip
    return path / "q"


MODELS = {"fp16": half, "awq": quantized}


@pytest.fixture(scope="module", params=MODELS)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def url(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    options = ("--model-path", str(root), "--tokenizer-path", str(root / "llm"))
    with sglang_server(log, *options) as address:
        yield address


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("index", range(len(questions(""))))
def test_log_probabilities(root: Path, url: str, index: int) -> None:
    messages = questions("")[index]
    expected, expected_length = reference(root, messages)
    found, length = ask(url, as_openai(messages))
    assert length == expected_length
    assert np.abs(expected - found).max() < TOLERANCE


def refusal(url: str, body: dict[str, Any]) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, body)
    assert caught.value.code == 400
    return str(json.load(caught.value))


def test_refused(url: str) -> None:
    def chat(*content: dict[str, Any]) -> str:
        messages = [{"role": "user", "content": [*content]}]
        return refusal(f"{url}/v1/chat/completions", {"model": "vila", "messages": messages})

    assert "holds <image>" in chat({"type": "text", "text": "the <image>"})
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    assert "data:" in chat(image)
    body = {"text": "the <image>", "image_data": "/etc/passwd", "sampling_params": {}}
    assert "need a chat" in refusal(f"{url}/generate", body)
