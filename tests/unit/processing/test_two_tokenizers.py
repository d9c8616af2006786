"""tokenizer.json beside tokenizer.model: the one that the original loads, where they disagree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.prompt_cases import write_tokenizer
from vila_deploy.processing.tokenizer import (
    PROBES,
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)

Values = dict[str, Any]


def prepend(library: Values) -> None:
    """As in the tokenizer.json of Llama-2 and Vicuna: a space after each special token too."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace]
    library["normalizer"] = {"type": "Sequence", "normalizers": steps}
    library["pre_tokenizer"] = None


def lowercase(library: Values) -> None:
    library["normalizer"] = {"type": "Lowercase"}


def no_merges(library: Values) -> None:
    library["model"]["merges"] = library["model"]["merges"][:3]


def a_token_more(library: Values) -> None:
    number = 1 + max(library["model"]["vocab"].values())
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    library["added_tokens"].append({"id": number, "content": "<more>", **flags})


def not_special(library: Values) -> None:
    library["decoder"] = {"type": "Fuse"}


CHANGES = [prepend, lowercase, no_merges, not_special]


def write_both(folder: Path, change: Callable[[Values], None], **settings: object) -> None:
    """Write Llama-2's kind of tokenizer.model, and beside it what transformers makes of it."""
    from transformers import AutoTokenizer

    made = folder / "made"
    made.mkdir(parents=True)
    write_tokenizer(made, "vicuna_v1")
    AutoTokenizer.from_pretrained(made, legacy=False).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(made / name, folder / name)
    shutil.rmtree(made)
    library = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(library)
    (folder / "tokenizer.json").write_text(json.dumps(library), "utf-8")
    values = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, **settings}), "utf-8")


@pytest.mark.parametrize("change", CHANGES)
def test_the_original_is_followed_where_they_disagree(
    change: Callable[[Values], None], tmp_path: Path
) -> None:
    write_both(tmp_path, change)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    (tmp_path / "tokenizer.json").unlink()
    alone = load_tokenizer(tmp_path)
    assert [tokenizer.encode(probe) for probe in PROBES] == [alone.encode(p) for p in PROBES]


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_fast_class_reads_tokenizer_json(
    change: Callable[[Values], None], name: str, tmp_path: Path
) -> None:
    write_both(tmp_path, change, tokenizer_class=name)
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)


def test_probes_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers makes of a tokenizer.model differs from it at spaces in front alone."""
    write_both(tmp_path, lambda library: None)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    others = tuple(probe for probe in PROBES if not probe.startswith(" "))
    monkeypatch.setattr("vila_deploy.processing.tokenizer.PROBES", others)
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)


def test_tokens_that_only_tokenizer_json_adds_are_read(tmp_path: Path) -> None:
    """As saved without added_tokens_decoder; the slow class takes them from there too."""

    def both(library: Values) -> None:
        prepend(library)
        a_token_more(library)

    write_both(tmp_path, both)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.decode(tokenizer.encode("the<more>in")) == "the<more>in"
