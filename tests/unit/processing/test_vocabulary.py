"""Tokenizers with ids beyond the embedding: taken where no prompt needs them, else refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.prompt_cases import write_tokenizer
from tests.support.tiny import make_checkpoint
from vila_deploy import build_engine as build_engine_folder
from vila_deploy.checkpoint.checkpoint import open_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.cli import build_engine, convert, quantize
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.processing.vocabulary import check_vocabulary
from vila_deploy.quantize import quantize_checkpoint
from vila_deploy.runtime.open_engine import open_engine
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


def tokens_without_rows(root: Path, rows: int = 368, **changes: object) -> Path:
    """Make a checkpoint whose tokenizer has 369 tokens, the last two <image> and [PAD]."""
    root = make_checkpoint(root, vocab=384, added_tokens=("<image>", "[PAD]"), **changes)
    tokenizer = Path("saved.json")
    tokenizer.write_bytes((root / "llm" / "tokenizer.json").read_bytes())
    shutil.rmtree(root)
    make_checkpoint(root, vocab=max(rows, 367), **changes)
    shutil.copy(tokenizer, root / "llm" / "tokenizer.json")
    if rows < 367:
        # Plans read no weights, and all checks come before those of the weights' shapes.
        config = root / "llm" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": rows}))
    tokenizer.unlink()
    return root


@pytest.mark.parametrize("name", COMMANDS)
def test_added_tokens_that_no_prompt_needs_are_taken_with_a_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens_without_rows(Path("c"), quantized=name == "convert")
    main, options = COMMANDS[name]
    if name == "quantize":
        options = [*options, "--no-eval", "--text-only", "--algorithm", "rtn", "--seed", "1"]
    result = CliRunner().invoke(main, ["c", *options])
    assert result.exit_code == 0, result.output
    note = "note: c/llm: added tokens beyond the 368 rows of the embedding: '[PAD]'; texts that"
    assert [line[: len(note)] for line in result.stderr.splitlines() if "beyond" in line] == [note]


@pytest.mark.parametrize("name", [name for name in COMMANDS if "plan" in name])
def test_a_vocabulary_larger_than_the_embedding_is_refused_at_the_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens_without_rows(Path("c"), rows=300)
    main, options = COMMANDS[name]
    result = CliRunner().invoke(main, ["c", *options])
    assert result.exit_code == 1, result.output
    assert result.stderr == (
        "error: c/llm: the tokenizer has 369 tokens, the model 300; "
        "use the tokenizer files that belong to this checkpoint\n"
    )


def test_tokens_of_the_prompt_itself_are_needed(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", qwen2=True)
    for file in (root / "llm").glob("*token*.json"):
        file.unlink()
    write_tokenizer(root / "llm", "qwen2")
    config = load_config(root)
    # 268 pieces, <|endoftext|>, <|im_start|>, <|im_end|>.
    for rows in (269, 270):
        llm = dataclasses.replace(config.llm, vocab_size=rows)
        with pytest.raises(VilaDeployError, match=f"has 271 tokens, the model {rows}"):
            check_vocabulary(root / "llm", dataclasses.replace(config, llm=llm))


def test_texts_that_spell_such_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tokens_without_rows(Path("c"))
    expected = r"the text has token '\[PAD\]', which the model has no embedding of; leave it out"
    build_engine_folder(root, "e", "cpu")
    with open_engine("e") as engine:
        assert engine.chat().ask("hi", sampling=SamplingParams(max_new_tokens=1)).tokens
        with pytest.raises(VilaDeployError, match=expected):
            engine.chat().ask("a [PAD] b")
    Path("t.txt").write_text("Some text with [PAD] in it.")
    with pytest.raises(VilaDeployError, match=expected):
        quantize_checkpoint(root, "q", calib="t.txt", group_size=64, no_eval=True)
    assert not Path("q").exists()


@pytest.mark.parametrize(
    ("named", "template"),
    [("vicuna_v1", "vicuna_v1"), ("v1", "vicuna_v1"), ("hermes-2", "hermes-2"), ("auto", None)],
)
def test_what_vila_exports_of_vila15_is_taken(
    named: str,
    template: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    added = ("<vila/sentinel>", "<image>", "<vila/video>")
    tokenizer = make_checkpoint(Path("t"), vocab=384, added_tokens=added)
    # As convert_vila_dev_ckpt_to_remote of llava/remote_code/modeling_vila.py leaves it.
    exported = {
        "version": "2.0",
        "model_type": "vila",
        "architectures": ["VILAForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_vila.VILAConfig"},
        "chat_template": named,
    }
    root = make_checkpoint(Path("c"), vocab=367, root_config=exported)
    (root / "vision_tower").rename("tower")
    (root / "vision_tower").symlink_to(Path("tower").resolve())
    (root / "modeling_vila.py").write_text("raise SystemExit")
    shutil.copy(tokenizer / "llm" / "tokenizer.json", root / "llm")
    config = open_checkpoint(root).config
    assert config.prompt_template == template
    check_vocabulary(root / "llm", config)
    assert "'<vila/sentinel>', '<image>', '<vila/video>'; texts" in capsys.readouterr().err


def test_as_many_or_fewer_tokens_than_rows_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_checkpoint(tmp_path / "c")
    tokens = load_tokenizer(root / "llm").vocab_size
    for rows in (tokens, tokens + 64):
        config = load_config(root)
        llm = dataclasses.replace(config.llm, vocab_size=rows)
        check_vocabulary(root / "llm", dataclasses.replace(config, llm=llm))
    assert capsys.readouterr().err == ""


def test_without_a_tokenizer_a_plan_is_made(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    for file in (root / "llm").glob("*token*.json"):
        file.unlink()
    config = load_config(root)
    llm = dataclasses.replace(config.llm, vocab_size=1)
    check_vocabulary(root / "llm", dataclasses.replace(config, llm=llm))
    result = CliRunner().invoke(build_engine.main, [str(root), "--target", "cpu", "--plan"])
    assert result.exit_code == 0, result.output


def test_a_damaged_tokenizer_is_found_by_a_plan(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    (root / "llm" / "tokenizer.json").write_text("{}", "utf-8")
    for main, options in (COMMANDS["quantize --plan"], COMMANDS["build --plan"]):
        result = CliRunner().invoke(main, [str(root), *options])
        assert result.exit_code == 1
        assert "is not a valid tokenizer" in result.stderr
