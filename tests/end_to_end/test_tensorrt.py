"""The graphs that TensorRT compiles, on onnxruntime: the reference's tokens in both dialects."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import succeed
from tests.support.comparison import NEW_TOKENS
from tests.support.graph_comparison import GraphRunner, compare, embedded, write_graphs
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.model.vila import ReferenceSession

PRECISIONS = ("fp16", "int4", "int4, symmetric")


@pytest.fixture(scope="module")
def prompts() -> list:
    """20 held-out questions with one, two and three images."""
    from tiny_vila.questions import held_out

    chosen = [(question.images, question.prompt) for question in held_out(60)]
    by_count = {n: [prompt for prompt in chosen if len(prompt[0]) == n] for n in (1, 2, 3)}
    return by_count[1][:10] + by_count[2][:5] + by_count[3][:5]


@pytest.fixture(scope="module")
def checkpoints(tiny_vila: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tensorrt")
    rounded = {"int4": [], "int4, symmetric": ["--symmetric"]}
    for name, flags in rounded.items():
        succeed("vila-quantize", tiny_vila, "-o", folder / name, "--algorithm", "rtn", *flags)
    return {"fp16": tiny_vila, **{name: folder / name for name in rounded}}


@pytest.mark.parametrize("dialect", ["standard", "primitive"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_give_the_references_tokens(
    checkpoints: dict[str, Path], tmp_path: Path, prompts: list, precision: str, dialect: str
) -> None:
    """20 prompts, 64 tokens; and closer to the reference than twice what fp16 PyTorch is."""
    write_graphs(tmp_path / "graphs", checkpoints[precision], dialect)
    found = compare(checkpoints[precision], tmp_path / "graphs", prompts)
    assert [len(tokens) for _, tokens in found.pairs] == [NEW_TOKENS] * 20
    assert [reference for reference, _ in found.pairs] == [graph for _, graph in found.pairs]
    assert 0 < found.kl <= 2 * found.half_kl


@pytest.mark.parametrize("dialect", ["standard", "primitive"])
def test_a_prompt_in_chunks_gives_the_same_tokens(
    checkpoints: dict[str, Path], tmp_path: Path, prompts: list, dialect: str
) -> None:
    """One, seven and 64 tokens at a time, as at once; with one, two and three images."""
    root = checkpoints["int4"]
    write_graphs(tmp_path / "graphs", root, dialect)
    checkpoint = open_checkpoint(root)
    embed = ReferenceSession(checkpoint).embed_tokens
    for prompt in embedded(root, [prompts[0], prompts[10], prompts[15]]):
        answers = [
            GraphRunner(tmp_path / "graphs", checkpoint, 1).generate_in_chunks(prompt, embed, size)
            for size in (len(prompt), 64, 7, 1)
        ]
        assert len(prompt) > 64
        assert len(answers[0]) == NEW_TOKENS
        assert answers == [answers[0]] * 4


def test_plain_command_builds_for_a_gpu_that_is_not_here(tiny_awq: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")
    printed = succeed(
        "vila-build-engine",
        tiny_awq,
        "--target",
        "a100",
        "--backend",
        "tensorrt",
        "-o",
        tmp_path / "engine",
    )
    assert "int4 engine for a100" in printed
    assert (tmp_path / "engine" / "llm" / "model.plan").stat().st_size > 1 << 20
