"""Tokenizers: a sentencepiece model against transformers' own reading of it, and damaged files."""

from __future__ import annotations

import pydoc
import sys
from pathlib import Path

import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.processing.tokenizer import IncrementalDetokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `tokenizer.model` of the kind that Llama-2 has: BPE with bytes as a last resort."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(Path(pydoc.__file__).read_text().splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "legacy": false, '
        '"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    return folder


@pytest.mark.parametrize(
    "text", ["Hello there", "a  b\nc é🎉", "", "\nWhat is it? ASSISTANT:", "x</s>y", "def f(): ..."]
)
def test_sentencepiece_equals_transformers(llama_folder: Path, text: str) -> None:
    from transformers import LlamaTokenizer

    expected = LlamaTokenizer.from_pretrained(llama_folder, legacy=False)(text).input_ids
    tokenizer = load_tokenizer(llama_folder)
    ids = tokenizer.encode(text)
    assert tokenizer.bos_ids + ids == expected


@pytest.mark.parametrize("text", ["Hello there", "a  b\nc é🎉", "", " def f(): ..."])
def test_sentencepiece_streams_what_it_decodes(llama_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(llama_folder)
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == tokenizer.decode(ids)


def test_sentencepiece_tokens_spell_their_text(llama_folder: Path) -> None:
    tokenizer = load_tokenizer(llama_folder)
    text = "a  b\nc é🎉"
    spelt = b"".join(tokenizer.token_bytes(number) or b"" for number in tokenizer.encode(text))
    assert spelt.decode() == f" {text}"
    assert tokenizer.token_bytes(tokenizer.vocab_size) is None
    assert {tokenizer.token_bytes(number) for number in tokenizer.bos_ids} <= {None}


def test_bos_comes_from_the_file_and_special_tokens_are_found(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_checkpoint(tmp_path / "c") / "llm")
    assert tokenizer.bos_ids == [1]
    assert tokenizer.encode("a</s>")[-1] == 2
    assert tokenizer.decode([1, *tokenizer.encode("a</s>")]) == "a"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, b"[" * 100_000])
def test_damaged_tokenizer_gives_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VilaDeployError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_library_is_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "c") / "llm"
    (folder / "tokenizer.model").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="tokenizers"):
        load_tokenizer(folder)
