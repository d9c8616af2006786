"""Tokenizers with ids beyond the embedding are refused by every command before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.tiny import make_checkpoint
from vila_deploy.cli import build_engine, convert, quantize
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.processing.vocabulary import check_vocabulary
from vila_deploy.utils.errors import VilaDeployError

COMMANDS = {
    "quantize --plan": (quantize.main, ["--plan"]),
    "quantize rtn --plan": (quantize.main, ["--plan", "--algorithm", "rtn"]),
    "quantize": (quantize.main, ["-o", "out"]),
    "quantize rtn": (quantize.main, ["-o", "out", "--algorithm", "rtn"]),
    "build --plan": (build_engine.main, ["--target", "cpu", "--plan"]),
    "build": (build_engine.main, ["--target", "cpu", "-o", "out"]),
    "convert": (convert.main, ["--to", "tinychat", "-o", "out"]),
}


def too_many(root: Path, **changes: object) -> Path:
    """Make a checkpoint of 368 rows whose tokenizer has one token more."""
    return make_checkpoint(root, vocab=368, added_tokens=("<image>", "[PAD]"), **changes)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_at_the_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    too_many(Path("c"), quantized=name == "convert")
    main, options = COMMANDS[name]
    result = CliRunner().invoke(main, ["c", *options])
    assert result.exit_code == 1, result.output
    expected = "error: c/llm: the tokenizer has 369 tokens, the model 368; use the tokenizer files"
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_as_many_or_fewer_tokens_than_rows_fit(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c") / "llm"
    tokens = load_tokenizer(folder).vocab_size
    check_vocabulary(folder, tokens)
    check_vocabulary(folder, tokens + 64)
    with pytest.raises(VilaDeployError, match=f"has {tokens} tokens, the model {tokens - 1}"):
        check_vocabulary(folder, tokens - 1)


def test_without_a_tokenizer_a_plan_is_made(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    for file in (root / "llm").glob("*token*.json"):
        file.unlink()
    check_vocabulary(root / "llm", 1)
    result = CliRunner().invoke(build_engine.main, [str(root), "--target", "cpu", "--plan"])
    assert result.exit_code == 0, result.output


def test_a_damaged_tokenizer_is_found_by_a_plan(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    (root / "llm" / "tokenizer.json").write_text("{}", "utf-8")
    for main, options in (COMMANDS["quantize --plan"], COMMANDS["build --plan"]):
        result = CliRunner().invoke(main, [str(root), *options])
        assert result.exit_code == 1
        assert "is not a valid tokenizer" in result.stderr
