"""tiny-vila behind vila-serve and vLLM, divided in every way, answers as our own engine does."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.commands import BIN, succeed
from tests.support.near_ties import margins
from tests.support.paths import TINY_VILA
from tests.support.vllm_serving import (
    as_messages,
    ask,
    ask_all,
    own_answers,
    serve,
    vila_serve,
)
from tiny_vila.questions import held_out

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

# Starting vLLM takes a minute or two on a computer with nothing else to do.
pytestmark = pytest.mark.timeout(1800)
QUESTIONS = held_out(100)
CONVERSATIONS = [as_messages(question) for question in QUESTIONS]
# Largest margin of a near-tie, as a share of the standard deviation of the logits.
TIE = 0.02
# Without compiling for minutes.
EAGER = ("--model-name", "m", "--", "--enforce-eager")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-vila in groups of 32, so that two ranks have whole ones."""
    folder = tmp_path_factory.mktemp("vllm") / "awq"
    succeed("vila-quantize", TINY_VILA, "-o", folder, "--group-size", 32, "--no-eval")
    return folder


@pytest.fixture(scope="module")
def int4(quantized: Path) -> list[str]:
    engine = quantized.parent / "int4"
    options = ("--activations", "int8x2", "--vision", "fp16", "--lm-head", "fp16")
    succeed("vila-build-engine", quantized, "--target", "cpu", "-o", engine, *options)
    return own_answers(engine, QUESTIONS)


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    engine = tmp_path_factory.mktemp("vllm") / "fp16"
    succeed("vila-build-engine", TINY_VILA, "--target", "cpu", "-o", engine, "--precision", "fp16")
    return own_answers(engine, QUESTIONS)


def assert_same(answers: list[str], own: list[str], engine: Path) -> None:
    """See that answers to the first questions are our engine's, but for at most 3% near-ties.

    vLLM adds in another order, and rounded weights differ from processor to processor.
    """
    pairs = zip(QUESTIONS, answers, own, strict=False)
    differ = [(question, answer) for question, answer, ours in pairs if answer != ours]
    questions = [(question.images, question.prompt) for question, _ in differ]
    near = margins(engine, questions, [answer for _, answer in differ])
    print("margins of near-ties:", near)
    assert len(near) == len(differ) <= 0.03 * len(answers), differ
    assert max(near, default=0) < TIE, near


def test_fp16(fp16: list[str], tmp_path: Path) -> None:
    port = free_port()
    with serve(vila_serve(TINY_VILA, port, *EAGER), port, tmp_path / "log") as served:
        assert ask_all(served.url, CONVERSATIONS) == fp16
        assert "<html" in httpx.get(served.url).text
        refused = httpx.post(
            f"{served.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "what is <image>"}]},
        )
        assert refused.status_code == 400
        assert served.stop() == 0


def test_awq_tensor_parallel(quantized: Path, int4: list[str], tmp_path: Path) -> None:
    port = free_port()
    words = vila_serve(quantized, port, "--tp", 2, *EAGER)
    with serve(words, port, tmp_path / "log") as served:
        assert_same(ask_all(served.url, CONVERSATIONS), int4, quantized.parent / "int4")


def test_awq_pipeline_parallel(quantized: Path, int4: list[str], tmp_path: Path) -> None:
    # vLLM 0.32 has no pipelines on a CPU with --enforce-eager; mode 2 traces without a compiler.
    port, traced = free_port(), ("--compilation-config", '{"mode": 2, "backend": "eager"}')
    words = vila_serve(quantized, port, "--pp", 2, "--model-name", "m", "--", *traced)
    with serve(words, port, tmp_path / "log") as served:
        answers = ask_all(served.url, CONVERSATIONS[:60])
        assert_same(answers, int4, quantized.parent / "int4")


def test_two_nodes(quantized: Path, int4: list[str], tmp_path: Path) -> None:
    port, master = free_port(), free_port()
    nodes = ("--tp", 2, "--nnodes", 2, "--master", f"127.0.0.1:{master}")
    first = vila_serve(quantized, port, *nodes, *EAGER)
    second = vila_serve(quantized, free_port(), *nodes, "--node-rank", 1, *EAGER)
    with (
        serve(second, port, tmp_path / "node1", ready=False),
        serve(first, port, tmp_path / "node0") as served,
    ):
        answers = ask_all(served.url, CONVERSATIONS[:40])
        assert_same(answers, int4, quantized.parent / "int4")


@pytest.fixture
def replicas(quantized: Path, tmp_path: Path) -> Iterator[list[Any]]:
    ports = [free_port(), free_port()]
    words = [vila_serve(quantized, port, *EAGER) for port in ports]
    with (
        serve(words[0], ports[0], tmp_path / "a") as first,
        serve(words[1], ports[1], tmp_path / "b") as second,
    ):
        yield [first, second]


def test_two_replicas_one_killed(
    replicas: list[Any], quantized: Path, int4: list[str], tmp_path: Path
) -> None:
    port = free_port()
    router: list[object] = [
        BIN / "vllm-router", "--worker-urls", *(replica.url for replica in replicas),
        "--host", "127.0.0.1", "--port", port, "--policy", "round_robin",
    ]  # fmt: skip
    with serve(router, port, tmp_path / "router") as served, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, served.url, c, 5) for c in CONVERSATIONS]
        answers[20].result()
        replicas[0].popen.kill()
        assert_same([answer.result() for answer in answers], int4, quantized.parent / "int4")
