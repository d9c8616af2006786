"""Convert text to token ids and back, from the tokenizer files of any release; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vila_deploy.processing.added_tokens import (
    FIX,
    MAX_TOKENS,
    AddedTokenEntry,
    named_bos,
    read_added_tokens,
    read_settings,
    read_special_tokens,
    unknown_class,
    wrong_id,
)
from vila_deploy.processing.sentencepiece_model import SentencePieceTokenizer
from vila_deploy.processing.token_bytes import (
    byte_fallback_bytes,
    byte_level_bytes,
    is_byte_level,
)
from vila_deploy.utils.errors import VilaDeployError, unreadable

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

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
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# How Qwen2 splits text before byte-level BPE: contractions, words, single digits, signs, spaces.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# transformers follows the first for other kinds of vocabulary than BPE, for BPE with the second.
CLEAN_UP = "clean_up_tokenization_spaces"
FORCED_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
REPLACEMENT = "\ufffd"
# Where readings of one vocabulary are known to differ: at the start, behind special tokens and line
# ends, in runs of spaces, in letters that a normalizer changes, in bytes.
PROBES = (
    "USER: \nWhat is it? ASSISTANT: A cat.</s>USER: And now? ASSISTANT:",
    "<|im_start|>user\nthe end<|im_end|><|im_start|>assistant\nyes",
    "<s>the</s> the</s>  the<unk>the",
    "", " ", "  two  spaces   three ", "\nthe\n\n the\tthe", "THE The ｔｈｅ ﬁ e\u0301 é",
    "日本語 été 😀 \u2581the", "1234 5,678.90 don't I'm C++ <br/>",
)  # fmt: skip


class Tokenizer(Protocol):
    """A tokenizer.

    `bos_ids`: what it puts before every text, [bos] or nothing. `bos_id`: the token that its files
    call BOS, whether it is put there or not; None: they name none.
    """

    bos_ids: list[int]
    bos_id: int | None
    vocab_size: int

    def encode(self, text: str, after_special: bool = False) -> list[int]:
        """Return the ids of `text` without BOS; special tokens written in it are recognised.

        Args:
            after_special: as a special token follows another text, not as text begins.
        """
        ...

    def tokens_beyond(self, rows: int) -> dict[int, str]:
        """Return the tokens whose ids are `rows` or more, by id."""
        ...

    def added_ids(self) -> set[int]:
        """Return the ids of tokens that were added to the vocabulary."""
        ...

    def token_id(self, token: str) -> int | None:
        """Return the id of one token; None if the vocabulary has no such token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` as transformers' decode(skip_special_tokens=True) does."""
        ...

    def token_bytes(self, number: int) -> bytes | None:
        """Return the bytes that an id stands for; None if it is special or stands for none."""
        ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer in `folder`, the one that the original loads if there are two.

    Raises:
        VilaDeployError: there is none, or it is damaged.
    """
    path = next((folder / name for name in _KINDS if (folder / name).is_file()), None)
    if path is None:
        raise VilaDeployError(
            f"holds none of {', '.join(_KINDS)}", where=folder, fix="download the whole checkpoint"
        )
    _refuse_settings(path)
    tokenizer, sentencepiece = _open(path), folder / "tokenizer.model"
    # VILA passes use_fast=False (llava/model/language_model/builder.py): a slow class reads
    # tokenizer.model, a fast one has no other file than tokenizer.json.
    fast = read_settings(path).text("tokenizer_class", "").endswith("Fast")
    if path.name == "tokenizer.json" and sentencepiece.is_file() and not fast:
        original = _open(sentencepiece)
        return tokenizer if _agree(tokenizer, original) else original
    return tokenizer


def _refuse_settings(path: Path) -> None:
    """Raise VilaDeployError where tokenizer_config.json asks for other ids, or for other text."""
    settings = read_settings(path)
    for key in ("add_eos_token", "split_special_tokens"):
        if settings.boolean(key, False):
            raise settings.error(key, "must be false, as every release of VILA has it")
    if settings.boolean(CLEAN_UP, False) and settings.boolean(FORCED_CLEAN_UP, False):
        raise settings.error(FORCED_CLEAN_UP, "must be false, as every release of VILA has it")
    if settings.values.get("sp_model_kwargs"):
        raise settings.error("sp_model_kwargs", "options of SentencePiece are not supported")
    # Other classes leave the space to tokenizer.json.
    llama = settings.text("tokenizer_class", "").startswith("Llama")
    if llama and not settings.boolean("add_prefix_space", True):
        raise settings.error("add_prefix_space", "must be true, as every release of VILA has it")


def _open(path: Path) -> Tokenizer:
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise VilaDeployError(f"larger than {MAX_TOKENIZER_BYTES} bytes", where=path)
        with path.open("rb"):  # the libraries say less of what can't be read
            return _KINDS[path.name](path)
    except (VilaDeployError, ModuleNotFoundError):
        raise
    except OSError as error:
        raise unreadable(error, path) from error
    # Both libraries raise plain Exception or RuntimeError for whatever is wrong in the file.
    except Exception as error:
        if isinstance(error, UnicodeEncodeError) and error.object == str(path):
            raise VilaDeployError(
                "the path is no UTF-8, which the libraries that read it need",
                where=path,
                fix="rename the folder",
            ) from error
        raise VilaDeployError(
            f"is not a valid tokenizer ({error})", where=path, fix="download it again"
        ) from error


def _agree(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two tokenizers do the same on prompts of every kind of conversation."""
    if first.bos_ids != second.bos_ids or first.vocab_size != second.vocab_size:
        return False
    for probe in PROBES:
        ids = first.encode(probe)
        if ids != second.encode(probe) or first.decode(ids) != second.decode(ids):
            return False
    # Every token has its id and its text: added ones are where two files differ most.
    numbers = range(first.vocab_size)
    return all(first.decode([number]) == second.decode([number]) for number in numbers)


class JsonTokenizer:
    """A Hugging Face `tokenizers` file."""

    def __init__(self, path: Path):
        self._library = self._load(path)
        settings, kind = read_settings(path), type(self._library.model).__name__
        if kind != "BPE" and settings.boolean(CLEAN_UP, False):
            raise settings.error(CLEAN_UP, f"must be false for a vocabulary of kind {kind}")
        self._library.no_truncation()
        self._library.no_padding()
        self.bos_ids = self._library.encode("", add_special_tokens=True).ids[:1]
        self.bos_id = named_bos(path, self.token_id, self.bos_ids)
        self.vocab_size = 1 + max(self._library.get_vocab().values(), default=-1)
        if self.vocab_size > MAX_TOKENS:
            raise VilaDeployError(f"has ids up to {self.vocab_size - 1}", where=path, fix=FIX)
        self._added = self._library.get_added_tokens_decoder()
        self._byte_level = is_byte_level(self._library.decoder)
        self._special = self._special_token()

    @property
    def library(self) -> Library:
        """The tokenizer of the `tokenizers` library."""
        return self._library

    def _load(self, path: Path) -> Library:
        from tokenizers import Tokenizer as Library

        library = Library.from_file(str(path))
        _add_tokens(library, path)
        return library

    def _special_token(self) -> str:
        """Return a special token that no text around it changes; empty where there is none."""
        for number, token in self._added.items():
            alone = token.special and not (token.lstrip or token.rstrip or token.normalized)
            if alone and self.encode(token.content) == [number]:
                return token.content
        return ""

    def encode(self, text: str, after_special: bool = False) -> list[int]:
        if after_special and text and self._special:
            return self._library.encode(self._special + text, add_special_tokens=False).ids[1:]
        return self._library.encode(text, add_special_tokens=False).ids

    def tokens_beyond(self, rows: int) -> dict[int, str]:
        if rows >= self.vocab_size:
            return {}
        found = ((number, token) for token, number in self._library.get_vocab().items())
        return {number: token for number, token in sorted(found) if number >= rows}

    def added_ids(self) -> set[int]:
        return set(self._added)

    def token_id(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self, number: int) -> bytes | None:
        if number in self._added:
            token = self._added[number]
            return None if token.special else token.content.encode()
        piece = self._library.id_to_token(number) if number >= 0 else None
        if piece is None:
            return None
        return byte_level_bytes(piece) if self._byte_level else byte_fallback_bytes(piece)


class Qwen2Tokenizer(JsonTokenizer):
    """vocab.json with merges.txt beside it: byte-level BPE with the patterns of Qwen2."""

    def _load(self, path: Path) -> Library:
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Library

        kind = read_settings(path).text("tokenizer_class", "")
        if kind not in QWEN2_CLASSES:
            raise unknown_class(kind, QWEN2_CLASSES, path)
        library = Library(models.BPE.from_file(str(path), str(path.with_name("merges.txt"))))
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        library.decoder = decoders.ByteLevel()
        _add_tokens(library, path)
        return library


def _add_tokens(library: Library, path: Path) -> None:
    """Add what lies beside `path`, as transformers does, which gives new tokens the next ids.

    Raises:
        VilaDeployError: the files give a token another id.
    """
    for entry in read_added_tokens(path):
        library.add_tokens([_library_token(entry)])
        number = library.token_to_id(entry.content)
        if number != entry.number:
            raise wrong_id(entry, number, path)
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens([t for t in read_special_tokens(path) if t not in added])


def _library_token(entry: AddedTokenEntry) -> AddedToken:
    from tokenizers import AddedToken

    return AddedToken(
        entry.content,
        single_word=entry.single_word,
        lstrip=entry.lstrip,
        rstrip=entry.rstrip,
        normalized=entry.normalized,
        special=entry.special,
    )


class IncrementalDetokenizer:
    """Turn ids that arrive one by one into text; incomplete characters are held back."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._shown = 0

    def push(self, token: int) -> str:
        """Return the text that `token` completes, possibly none."""
        self._ids.append(token)
        # Decoding begins one shown token early: whether a space goes before depends on it.
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        if after.endswith(REPLACEMENT):
            return ""
        # A decoder strips the first space; behind a token without text it would be the wrong one.
        if self._tokenizer.decode(self._ids[self._shown :]):
            self._start = self._shown
        self._shown = len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """Return the text that is still held back when the answer ends."""
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        after = self._tokenizer.decode(self._ids[self._start :])
        return after[len(before) :]


_KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.json": JsonTokenizer,
    "tokenizer.model": SentencePieceTokenizer,
    "vocab.json": Qwen2Tokenizer,
}
