"""A checkpoint's tokenizer as the metadata of a GGUF file, from which llama.cpp makes its own.

llama.cpp knows how to split text by name only (`tokenizer.ggml.pre`); a tokenizer that splits in
another way than those names mean is refused. Source: llama-vocab.cpp of
github.com/ggml-org/llama.cpp (b11434).
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from vila_deploy.processing.added_tokens import read_named_token, read_settings
from vila_deploy.processing.chat_template import PromptTemplate
from vila_deploy.processing.sentencepiece_model import SentencePieceTokenizer
from vila_deploy.processing.token_bytes import is_byte_fallback
from vila_deploy.processing.tokenizer import QWEN2_WORDS, JsonTokenizer, Tokenizer
from vila_deploy.utils.errors import VilaDeployError, short

# How Llama 3 splits text: as Qwen2 but for numbers, of up to three digits.
LLAMA_3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# Below every score of a piece that merges make.
NEVER_MERGED = -1e6
KEY = "tokenizer.ggml"
NAMED = {"eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
FIX = "choose another format; vila-chat and vila-serve read this tokenizer"


class TokenType(IntEnum):
    """LLAMA_TOKEN_TYPE_* of llama.h."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class _Entry:
    """A token: its text, score and type."""

    def __init__(self, text: str, score: float, kind: TokenType):
        self.text, self.score, self.kind = text, score, kind


def vocabulary_metadata(
    folder: Path, tokenizer: Tokenizer, template: PromptTemplate, rows: int
) -> dict[str, Any]:
    """Return the metadata of the tokenizer in `folder`, opened as `tokenizer`.

    Args:
        rows: of the embedding; ids without a token get a name that no text has.

    Raises:
        VilaDeployError: llama.cpp has no tokenizer that does the same.
    """
    values: dict[str, Any]
    if isinstance(tokenizer, SentencePieceTokenizer):
        values, entries = {"model": "llama", "pre": "default"}, _sentencepiece(tokenizer)
    else:
        assert isinstance(tokenizer, JsonTokenizer)
        values, entries = _json(tokenizer, folder)
    tokens = [
        entries.get(number, _Entry(f"[PAD{number}]", NEVER_MERGED, TokenType.UNUSED))
        for number in range(rows)
    ]
    values |= {
        "tokens": [token.text for token in tokens],
        "token_type": [int(token.kind) for token in tokens],
    }
    if values["model"] == "llama":
        values["scores"] = [float(token.score) for token in tokens]
    values |= _special(folder, tokenizer, template, rows)
    return {f"{KEY}.{key}": value for key, value in values.items()}


def _special(
    folder: Path, tokenizer: Tokenizer, template: PromptTemplate, rows: int
) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    names = {kind: read_named_token(path, key) for key, kind in NAMED.items()}
    # The token that ends a turn, where it is another than the one that ends a text.
    names["eot"] = template.stops[0]
    ids = {kind: tokenizer.token_id(name) for kind, name in names.items() if name}
    ids["bos"] = tokenizer.bos_id
    if ids.get("eos") is None:
        ids["eos"] = ids.get("eot")
    values: dict[str, Any] = {
        f"{kind}_token_id": number
        for kind, number in ids.items()
        if number is not None and number < rows
    }
    return {**values, "add_bos_token": bool(tokenizer.bos_ids), "add_eos_token": False}


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[int, _Entry]:
    library = tokenizer.library
    kinds = (
        (library.is_unknown, TokenType.UNKNOWN),
        (library.is_control, TokenType.CONTROL),
        (library.is_unused, TokenType.UNUSED),
        (library.is_byte, TokenType.BYTE),
    )
    entries = {}
    for number in range(library.vocab_size()):
        kind = next((kind for test, kind in kinds if test(number)), TokenType.NORMAL)
        entries[number] = _Entry(library.id_to_piece(number), library.get_score(number), kind)
    for number, text in tokenizer.added_texts.items():
        if entries.get(number) is None or entries[number].kind is not TokenType.UNKNOWN:
            special = tokenizer.token_bytes(number) is None
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
            entries[number] = _Entry(text, NEVER_MERGED, kind)
    return entries


def _json(tokenizer: JsonTokenizer, folder: Path) -> tuple[dict[str, Any], dict[int, _Entry]]:
    library = tokenizer.library
    state = json.loads(library.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown(folder, f"a {short(model['type'])} model")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    scores = {merge.replace(" ", "", 1): -rank for rank, merge in reversed([*enumerate(merges, 1)])}
    entries = {}
    for text, number in library.get_vocab(with_added_tokens=True).items():
        byte = model["byte_fallback"] and is_byte_fallback(text)
        kind = TokenType.BYTE if byte else TokenType.NORMAL
        entries[number] = _Entry(text, scores.get(text, NEVER_MERGED), kind)
    for number, token in library.get_added_tokens_decoder().items():
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        if token.content == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        entries[number] = _Entry(token.content, NEVER_MERGED, kind)
    if model["byte_fallback"]:
        prefix = _space_prefix(state, folder)
        return {"model": "llama", "pre": "default", "add_space_prefix": prefix}, entries
    pre = _pre_tokenizer(state, folder)
    return {"model": "gpt2", "pre": pre, "merges": merges or [" "]}, entries


def _space_prefix(state: dict[str, Any], folder: Path) -> bool:
    """Return whether text gets a space in front, of a tokenizer made from a sentencepiece model."""
    steps = _steps(state["normalizer"], "normalizers") + _steps(state["pre_tokenizer"], "")
    prefix = spaces = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Metaspace":
            spaces, prefix = True, prefix or step.get("prepend_scheme", "always") != "never"
        elif step["type"] == "Replace" and step["content"] == "▁":
            spaces = True
        else:
            raise _unknown(folder, f"a {short(step['type'])}")
    if not spaces:
        raise _unknown(folder, "spaces that are not written as ▁")
    return prefix


def _pre_tokenizer(state: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text."""
    for step in _steps(state["normalizer"], "normalizers"):
        # llama.cpp leaves NFC out, which changes decomposed letters alone.
        if step["type"] != "NFC":
            raise _unknown(folder, f"a {short(step['type'])}")
    found = tuple(_pattern(step) for step in _steps(state["pre_tokenizer"], "pretokenizers"))
    words = ("bytes",)
    own = "llama-bpe" if state["model"].get("ignore_merges") else "dbrx"
    names = {
        ("gpt2 words",): "gpt-2",
        ("digits", "gpt2 words"): "smollm",
        (QWEN2_WORDS, *words): "qwen2",
        (LLAMA_3_WORDS, *words): own,
    }
    if found not in names:
        raise _unknown(folder, f"the pattern {short(found[0] if found else '')}")
    return names[found]


def _pattern(step: dict[str, Any]) -> str:
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt2 words" if step["use_regex"] else "bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"]
        return str(pattern.get("Regex", pattern))
    return f"{step['type']}"


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" and inner in part else [part]


def _unknown(folder: Path, what: str) -> VilaDeployError:
    where = read_settings(folder / "tokenizer.json").source.with_name("tokenizer.json")
    what = f"llama.cpp has no tokenizer with {what}, as this one has"
    return VilaDeployError(what, where=where, fix=FIX)
