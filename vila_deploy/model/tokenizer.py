"""Text to token ids and back, from tokenizer.json or a sentencepiece tokenizer.model; no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.errors import VilaDeployError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
MAX_TOKENIZER_BYTES = 128 << 20
REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """`bos_ids` is what goes once before a prompt: [bos] or nothing."""

    bos_ids: list[int]
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without BOS; special tokens written out in it are recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """Opens the tokenizer that lies in `folder`.

    Raises:
        VilaDeployError: neither tokenizer.json nor tokenizer.model is there, or it is damaged.
    """
    kinds: dict[str, Callable[[Path], Tokenizer]] = {
        "tokenizer.json": JsonTokenizer,
        "tokenizer.model": SentencePieceTokenizer,
    }
    for name, kind in kinds.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise VilaDeployError(f"larger than {MAX_TOKENIZER_BYTES} bytes", where=path)
            return kind(path)
        except VilaDeployError:
            raise
        # Both libraries raise plain Exception or RuntimeError for whatever is wrong in the file.
        except Exception as error:
            raise VilaDeployError(
                f"is not a valid tokenizer ({error})", where=path, fix="download it again"
            ) from error
    raise VilaDeployError(
        f"holds none of {', '.join(kinds)}", where=folder, fix="download the whole checkpoint"
    )


class JsonTokenizer:
    """A Hugging Face `tokenizers` file."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Library

        self._library = Library.from_file(str(path))
        self._library.no_truncation()
        self._library.no_padding()
        self.bos_ids = self._library.encode("", add_special_tokens=True).ids[:1]
        self.vocab_size = self._library.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)


class SentencePieceTokenizer:
    """A Llama `tokenizer.model`, with the legacy rule that each stretch of text begins anew."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        self._library = SentencePieceProcessor()
        self._library.LoadFromSerializedProto(path.read_bytes())
        self.vocab_size = self._library.vocab_size()
        config = path.with_name("tokenizer_config.json")
        fields = Fields.from_file(config) if config.exists() else Fields({}, config)
        adds_bos = fields.boolean("add_bos_token", True) and self._library.bos_id() >= 0
        self.bos_ids = [self._library.bos_id()] if adds_bos else []
        special = (self._library.bos_id(), self._library.eos_id(), self._library.unk_id())
        self._special = {self._library.id_to_piece(i): i for i in special if i >= 0}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for stretch in self._split.split(text):
            if stretch in self._special:
                ids.append(self._special[stretch])
            elif stretch:
                ids += self._library.encode(stretch)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self._special.values())
        return self._library.decode([i for i in ids if i not in special])


class TextStream:
    """Turns ids that arrive one by one into text; a character that is not whole yet waits."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._shown = 0

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        self._ids.append(token)
        # Decoding begins one shown token early: whether a space goes before depends on it.
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        if after.endswith(REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What is still held back when the answer ends."""
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        return after[len(before) :]
