"""Convert text to token ids and back with a sentencepiece model, `tokenizer.model`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.processing.added_tokens import (
    FIX,
    AddedTokenEntry,
    named_bos,
    read_added_tokens,
    read_named_token,
    read_settings,
    read_special_tokens,
    unknown_class,
    wrong_id,
)
from vila_deploy.processing.token_bytes import byte_fallback_bytes
from vila_deploy.utils.errors import VilaDeployError, short

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
DEFAULT_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Appended to a sentencepiece model this sets its normalizer_spec.add_dummy_prefix to false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """A Llama `tokenizer.model`; a space is added before the text, but not after special tokens.

    VILA loads every tokenizer of this kind so, with transformers' `legacy=False`.
    """

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor
        from tokenizers import decoders

        kind = read_settings(path).text("tokenizer_class", LLAMA_CLASSES[0])
        if kind not in LLAMA_CLASSES:
            raise unknown_class(kind, LLAMA_CLASSES, path)
        self._library = SentencePieceProcessor()
        self._library.LoadFromSerializedProto(path.read_bytes() + NO_DUMMY_PREFIX)
        adds_bos = (
            read_settings(path).boolean("add_bos_token", True) and self._library.bos_id() >= 0
        )
        self.bos_ids = [self._library.bos_id()] if adds_bos else []
        special = (self._library.bos_id(), self._library.eos_id(), self._library.unk_id())
        self._added = {self._library.id_to_piece(i): i for i in special if i >= 0}
        self._check_names(path)
        entries = read_added_tokens(path)
        for entry in entries:
            self._check(entry, path)
            self._added[entry.content] = entry.number
        for content in read_special_tokens(path):
            # transformers gives tokens that are named only the next ids.
            if content not in self._added and self.token_id(content) is None:
                used = (self._library.vocab_size() - 1, *self._added.values())
                self._added[content] = max(used) + 1
        self.vocab_size = max(self._library.vocab_size(), *(i + 1 for i in self._added.values()))
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._texts = {number: content for content, number in self._added.items()}
        plain = {entry.number for entry in entries if not entry.special}
        named = (self.token_id(token) for token in read_special_tokens(path))
        self._skipped = {*special, *named, *(self._texts.keys() - plain)}
        self.bos_id = named_bos(path, self.token_id, self.bos_ids)
        self._decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        )

    def _check_names(self, path: Path) -> None:
        """Raise VilaDeployError where the model lacks a token that transformers takes for named."""
        for key, default in DEFAULT_TOKENS.items():
            if (
                read_named_token(path, key) is None
                and self._library.piece_to_id(default) == self._library.unk_id()
            ):
                raise VilaDeployError(
                    f"{key} is missing, and the model has no {default}",
                    where=path.with_name("tokenizer_config.json"),
                    fix=FIX,
                )
        unknown = self._library.id_to_piece(self._library.unk_id())
        named = read_named_token(path, "unk_token")
        if named not in (None, unknown):
            what = f"unk_token is {short(named)}, tokenizer.model has {short(unknown)}"
            raise VilaDeployError(what, where=path, fix=FIX)

    def _check(self, entry: AddedTokenEntry, path: Path) -> None:
        """Raise VilaDeployError where an added token and the model's pieces contradict each other.

        A control piece may get another name; as text it means nothing.
        """
        library, number = self._library, self.token_id(entry.content)
        if number is None and entry.number < library.vocab_size():
            unnamed = library.is_control(entry.number) or library.is_unused(entry.number)
            number = entry.number if unnamed else None
            if number is None:
                piece = library.id_to_piece(entry.number)
                what = f"token {short(entry.content)} has id {entry.number}, that is {short(piece)}"
                raise VilaDeployError(what, where=path, fix=FIX)
        # Sorted by id, so what was added before has all ids up to the next one.
        following = max(library.vocab_size(), *(n + 1 for n in self._added.values()))
        number = min(entry.number, following) if number is None else number
        if number != entry.number:
            raise wrong_id(entry, number, path)
        if entry.lstrip or entry.rstrip or entry.single_word:
            what = f"token {short(entry.content)} has lstrip, rstrip or single_word"
            fix = "set them to false in tokenizer_config.json; others are not followed here"
            raise VilaDeployError(what, where=path, fix=fix)

    @property
    def library(self) -> SentencePieceProcessor:
        """The model itself, without what was added to it."""
        return self._library

    @property
    def added_texts(self) -> dict[int, str]:
        """The tokens that text may spell beside the model's pieces, by id."""
        return dict(self._texts)

    def encode(self, text: str, after_special: bool = False) -> list[int]:
        ids: list[int] = []
        for index, span in enumerate(self._split.split(text.replace("\u2581", " "))):
            if span in self._added:
                ids.append(self._added[span])
            elif span:
                ids += self._library.encode(span if index or after_special else f" {span}")
        return ids

    def tokens_beyond(self, rows: int) -> dict[int, str]:
        pieces = range(rows, self._library.vocab_size())
        added = sorted((n, content) for n, content in self._texts.items() if n >= rows)
        return {**{n: self._library.id_to_piece(n) for n in pieces}, **dict(added)}

    def added_ids(self) -> set[int]:
        return set(self._texts)

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        number = self._library.piece_to_id(token)
        return None if number == self._library.unk_id() else number

    def decode(self, ids: Sequence[int]) -> str:
        pieces = (self._piece(number) for number in ids if number not in self._skipped)
        return self._decoder.decode([piece for piece in pieces if piece is not None])

    def token_bytes(self, number: int) -> bytes | None:
        if number in self._skipped:
            return None
        piece = self._piece(number)
        if piece is None or number in self._texts:
            return None if piece is None else piece.encode()
        return byte_fallback_bytes(piece)

    def _piece(self, number: int) -> str | None:
        """Return the text of an id; None for control pieces and ids beyond the vocabulary."""
        if number in self._texts:
            return self._texts[number]
        if not 0 <= number < self._library.vocab_size() or self._library.is_control(number):
            return None
        return self._library.id_to_piece(number)
