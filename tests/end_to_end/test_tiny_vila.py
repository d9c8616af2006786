"""tiny-vila from checkpoint to answer: same tokens as the reference, right answers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.support.commands import succeed
from tests.support.comparison import NEW_TOKENS, greedy_tokens_of_both
from tests.support.documents import blocks, commands
from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def prompts() -> list:
    """20 held-out questions with one, two and three images."""
    from tiny_vila.questions import held_out

    chosen = [(question.images, question.prompt) for question in held_out(60)]
    by_count = {n: [prompt for prompt in chosen if len(prompt[0]) == n] for n in (1, 2, 3)}
    return by_count[1][:10] + by_count[2][:5] + by_count[3][:5]


def test_int4_engine_equals_reference(
    tiny_awq: Path, tiny_close_engine: Path, prompts: list
) -> None:
    pairs = greedy_tokens_of_both(tiny_awq, tiny_close_engine, prompts)
    assert len(pairs) == 20
    assert all(len(tokens) == NEW_TOKENS for tokens, _ in pairs)
    assert [reference for reference, _ in pairs] == [engine for _, engine in pairs]


def test_fp16_engine_equals_reference(tiny_vila: Path, tmp_path: Path, prompts: list) -> None:
    engine = tmp_path / "engine"
    succeed("vila-build-engine", tiny_vila, "--target", "cpu", "-o", engine)
    pairs = greedy_tokens_of_both(tiny_vila, engine, prompts)
    assert len(pairs) == 20
    assert [reference for reference, _ in pairs] == [engine for _, engine in pairs]


def test_chat_answers_a_question_about_pictures(tiny_engine: Path, tmp_path: Path) -> None:
    from tiny_vila.questions import held_out

    right = 0
    for question in held_out(21)[:7]:
        flags = []
        for index, image in enumerate(question.images):
            image.save(tmp_path / f"{index}.png")
            flags += ["--image", tmp_path / f"{index}.png"]
        printed = succeed("vila-chat", tiny_engine, *flags, "-p", question.prompt, "--json")
        answer = json.loads(printed)
        assert {"text", "tokens", "timings_ms"} <= answer.keys()
        right += answer["text"] == question.answer
    assert right >= 5


def test_readme_shows_this_answer(tiny_engine: Path) -> None:
    block = next(blocks(REPOSITORY / "README.md", "console"))
    (command,) = commands(block)
    name, _, *arguments = shlex.split(command.line)
    paths = [REPOSITORY / word if word.endswith(".png") else word for word in arguments]
    assert succeed(name, tiny_engine, *paths).splitlines() == list(command.output)


def test_text_only_prompt_works(tiny_engine: Path) -> None:
    assert succeed("vila-chat", tiny_engine, "-p", "Hello?", "--max-new-tokens", 8).endswith("\n")


def test_bench_reports_every_promised_key(tiny_engine: Path) -> None:
    (row,) = json.loads(succeed("vila-bench", tiny_engine, "-o", "json"))
    assert row["weights"] == "trained"
    assert row["precision"] == "int4"
    assert set(row["ttft_ms"]) == {"preprocess", "vision", "prefill", "total"}
    for key in ("model", "target", "backend", "device"):
        assert isinstance(row[key], str), key
    for key in (
        "decode_tokens_per_s", "peak_memory_bytes", "weight_bytes_per_token",
        "read_bandwidth_bytes_per_s", "roofline_fraction",
    ):  # fmt: skip
        assert row[key] > 0, key
    share = row["weight_bytes_per_token"] * row["decode_tokens_per_s"]
    assert row["roofline_fraction"] == pytest.approx(share / row["read_bandwidth_bytes_per_s"])
