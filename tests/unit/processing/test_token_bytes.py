"""Bytes of single tokens: those of a text's tokens spell the text, whatever the tokenizer."""

from __future__ import annotations

import pytest

from tests.support.paths import TINY_VILA
from vila_deploy.processing.token_bytes import byte_level_bytes, byte_names
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer

TEXTS = (' {"é": "日本"}\n', "  two  spaces\t😀", "it's <b>C++</b>")


def spelt(tokenizer: Tokenizer, text: str) -> str:
    return b"".join(tokenizer.token_bytes(n) or b"" for n in tokenizer.encode(text)).decode()


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallback(text: str) -> None:
    tokenizer = load_tokenizer(TINY_VILA / "llm")
    assert spelt(tokenizer, text).removeprefix(" ") == text.removeprefix(" ")
    assert tokenizer.token_bytes(1) is None, "BOS stands for no text"
    assert tokenizer.token_bytes(tokenizer.vocab_size) is None
    assert tokenizer.token_bytes(-1) is None


def test_byte_names_are_gpt2s() -> None:
    names = byte_names()
    assert sorted(names.values()) == list(range(256))
    assert (names["Ġ"], names["Ċ"], names["a"]) == (ord(" "), ord("\n"), ord("a"))
    assert byte_level_bytes("ĠĊé") == b" \n\xe9"
    assert byte_level_bytes("日") == "日".encode()
