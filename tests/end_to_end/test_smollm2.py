"""A real LLM from checkpoint to answer, and its 4-bit files read by an unpacker of our own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from tests.support.commands import succeed
from tests.support.comparison import NEW_TOKENS, greedy_tokens_of_both, noise
from tests.support.serving import chat_answers, served_answers, serving
from tests.support.smollm2 import make_smollm2_vila

QUESTIONS = (
    "What do you see?", "Write a short poem about rain.", "Explain recursion to a child.",
    "List three fruits.", "Who wrote Hamlet?", "Describe the picture.", "What is 12 times 12?",
    "Give a synonym of happy.", "Why is the sky blue?", "Summarise the plot of Cinderella.",
)  # fmt: skip

# A real LLM on two busy cores: minutes, not seconds.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_smollm2_vila(tmp_path_factory.mktemp("smollm2") / "checkpoint")


@pytest.fixture(scope="module")
def quantized(smollm2: Path) -> Path:
    """Rounded to nearest: AWQ writes the same format but would take minutes here."""
    out = smollm2.parent / "rtn"
    succeed("vila-quantize", smollm2, "-o", out, "--group-size", 64, "--algorithm", "rtn")
    return out


@pytest.fixture(scope="module")
def int4_engine(quantized: Path) -> Path:
    out = quantized.parent / "int4"
    # One int8 term and an int8 head round what the reference doesn't.
    options = [
        "--max-seq-len",
        1024,
        "--activations",
        "int8x2",
        "--lm-head",
        "fp16",
        "--vision",
        "fp16",
    ]
    succeed("vila-build-engine", quantized, "--target", "cpu", "-o", out, *options)
    return out


@pytest.fixture(scope="module")
def prompts() -> list:
    """20 prompts with one to three images."""
    return [
        ([noise(10 * index + k) for k in range(1 + index % 3)], QUESTIONS[index % len(QUESTIONS)])
        for index in range(20)
    ]


def test_int4_engine_equals_reference(quantized: Path, int4_engine: Path, prompts: list) -> None:
    pairs = greedy_tokens_of_both(quantized, int4_engine, prompts)
    assert all(len(tokens) == NEW_TOKENS for tokens, _ in pairs)
    assert [reference for reference, _ in pairs] == [engine for _, engine in pairs]


def test_fp16_engine_equals_reference(smollm2: Path, prompts: list) -> None:
    engine = smollm2.parent / "fp16"
    succeed("vila-build-engine", smollm2, "--target", "cpu", "-o", engine, "--max-seq-len", 1024)
    pairs = greedy_tokens_of_both(smollm2, engine, prompts)
    assert [reference for reference, _ in pairs] == [engine for _, engine in pairs]


def test_served_answers_are_those_of_chat(int4_engine: Path, prompts: list) -> None:
    """Alone and with eight at once: decode passes of any number of rows give the same bits."""
    cases = [(text, images) for images, text in prompts[:8]]
    expected = chat_answers(int4_engine, cases, max_tokens=8)
    with serving(int4_engine) as server:
        assert server.engine.session.slots == 8
        assert served_answers(server, cases[:3], max_tokens=8, at_once=1) == expected[:3]
        assert served_answers(server, cases[::-1], max_tokens=8, at_once=8) == expected[::-1]
        stats = server.api.scheduler.stats()
    assert stats.decoded_rows > 1.5 * stats.decode_steps, "several rows in a pass"


def unpack_words(words: np.ndarray) -> np.ndarray:
    """int32 [rows, columns/8] → levels [rows, columns], from the AutoAWQ GEMM description.

    Nibble k of a word, from the low end, holds column (0, 2, 4, 6, 1, 3, 5, 7)[k] of its eight.
    """
    words = words.view(np.uint32)
    levels = np.empty((words.shape[0], words.shape[1] * 8), np.int32)
    for k, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        levels[:, column::8] = (words >> np.uint32(4 * k)) & np.uint32(15)
    return levels


def autoawq_weight(tensors: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """float32 [in, out] of one linear, read without any code of this project."""
    levels = unpack_words(tensors[f"{prefix}.qweight"])
    zeros = unpack_words(tensors[f"{prefix}.qzeros"])
    scales = tensors[f"{prefix}.scales"].astype(np.float32)
    group = len(levels) // len(scales)
    return (levels - zeros.repeat(group, 0)) * scales.repeat(group, 0)


def engine_weight(tensors: dict[str, np.ndarray], node: onnx.NodeProto) -> np.ndarray:
    """float32 [in, out] of one MatMulNBits node, from the operator's description."""
    facts = {a.name: a.i for a in node.attribute}
    inputs, outputs, block = facts["K"], facts["N"], facts["block_size"]
    packed, scales, zeros = (tensors[name] for name in node.input[1:4])

    def nibbles(data: np.ndarray, count: int) -> np.ndarray:
        data = data.reshape(outputs, -1)
        both = np.stack([data & 15, data >> 4], axis=-1).reshape(outputs, -1)
        return both[:, :count].astype(np.int32)

    groups = inputs // block
    levels = nibbles(packed, inputs) - nibbles(zeros, groups).repeat(block, 1)
    return (levels * scales.astype(np.float32).reshape(outputs, groups).repeat(block, 1)).T


def test_independent_unpacker_gives_the_weights_of_the_engine(
    quantized: Path, int4_engine: Path
) -> None:
    stored: dict[str, np.ndarray] = {}
    for file in sorted((quantized / "llm").glob("*.safetensors")):
        stored |= load_file(file)
    prefixes = sorted(n.removesuffix(".qweight") for n in stored if n.endswith(".qweight"))
    assert len(prefixes) == 30 * 7
    expected = [autoawq_weight(stored, prefix) for prefix in prefixes]

    graph = onnx.load(int4_engine / "llm" / "model.onnx").graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    # Products with the identity split activations into int8 terms; they hold no weights.
    nodes = [n for n in nodes if not n.input[1].startswith("identity")]
    found = np.concatenate([engine_weight(tensors, node).ravel() for node in nodes])
    # The engine may join linears that share an input, so whole columns are compared, in any order.
    assert found.size == sum(weight.size for weight in expected)
    assert column_digests(expected) == column_digests(
        [engine_weight(tensors, node) for node in nodes]
    )


def column_digests(weights: list[np.ndarray]) -> list[bytes]:
    return sorted(
        column.tobytes() for weight in weights for column in np.ascontiguousarray(weight.T)
    )
