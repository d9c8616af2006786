"""Read which tokens were added to a vocabulary, and which of them answers leave out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields
from vila_deploy.utils.files import read_json_object

MAX_TOKENS = 1 << 24
FIX = "download the tokenizer files again"
# transformers' SPECIAL_TOKENS_ATTRIBUTES (tokenization_utils_base.py); always special.
NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
SPECIAL_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedTokenEntry:
    """A token added to a vocabulary, with the flags of `tokenizers.AddedToken`."""

    content: str
    number: int
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


def read_settings(path: Path) -> Fields:
    """Return tokenizer_config.json beside a tokenizer file; empty where there is none."""
    config = path.with_name("tokenizer_config.json")
    return Fields.from_file(config) if config.exists() else Fields({}, config)


def read_added_tokens(path: Path) -> list[AddedTokenEntry]:
    """Return the tokens of tokenizer_config.json and added_tokens.json beside `path`, by id.

    As transformers' `from_pretrained` reads them: added_tokens.json holds no flags, so its tokens
    are special only where the settings name them. Without added_tokens_decoder, those of a
    tokenizer.json beside another kind of file count too.
    """
    named = read_special_tokens(path)
    settings = read_settings(path)
    entries: dict[str, AddedTokenEntry] = {}
    library = path.with_name("tokenizer.json")
    if path != library and library.exists() and "added_tokens_decoder" not in settings:
        tokens = read_json_object(library).get("added_tokens")
        for index, values in enumerate(tokens if isinstance(tokens, list) else ()):
            if isinstance(values, dict):
                token = Fields(values, library, f"added_tokens.{index}.")
                entry = _entry(token, token.integer("id", low=0, high=MAX_TOKENS), named)
                entries[entry.content] = entry
    added = path.with_name("added_tokens.json")
    if added.exists():
        fields = Fields.from_file(added)
        for content in filter(None, fields.values):
            number = fields.integer(content, low=0, high=MAX_TOKENS)
            special = content in named
            entries[content] = AddedTokenEntry(content, number, special, normalized=not special)
    if "added_tokens_decoder" in settings:
        decoder, decoded = settings.child("added_tokens_decoder"), []
        for key in decoder.values:
            if not key.isdecimal() or int(key) >= MAX_TOKENS:
                raise decoder.error(short(key), "must be a token's id")
            entry = _entry(decoder.child(key), int(key), named)
            before = entries.get(entry.content)
            if before is not None and before.number != entry.number:
                raise decoder.error(
                    short(key),
                    f"is token {short(entry.content)}, {added.name} gives it {before.number}",
                    FIX,
                )
            entries[entry.content] = entry
            decoded.append(entry)
        # Where this key is, transformers doesn't read added_tokens.json.
        missing = entries.keys() - {entry.content for entry in decoded}
        if missing:
            what = f"lacks token {short(min(missing))}, which {added.name} has"
            raise settings.error("added_tokens_decoder", what, FIX)
    entries.pop("", None)
    return sorted(entries.values(), key=lambda entry: entry.number)


def _entry(token: Fields, number: int, named: Collection[str]) -> AddedTokenEntry:
    content, special = token.text("content"), token.boolean("special", False)
    return AddedTokenEntry(
        content,
        number,
        special or content in named,
        single_word=token.boolean("single_word", False),
        lstrip=token.boolean("lstrip", False),
        rstrip=token.boolean("rstrip", False),
        normalized=token.boolean("normalized", not special),
    )


def read_special_tokens(path: Path) -> list[str]:
    """Return the tokens that tokenizer_config.json or special_tokens_map.json name as special.

    In the order in which transformers gives new ids to those that a vocabulary lacks.
    """
    files = _naming_files(path)
    named = [
        next(filter(None, (_contents(fields, key) for fields in files)), [])
        for key in (*NAMED_TOKENS, *SPECIAL_TOKEN_LISTS)
    ]
    return list(dict.fromkeys(content for contents in named for content in contents))


def read_named_token(path: Path, key: str) -> str | None:
    """Return the token that the same files name as `key`, e.g. bos_token; None: they name none."""
    contents = [_contents(fields, key) for fields in _naming_files(path)]
    return next((content for content, *_ in filter(None, contents)), None)


def _naming_files(path: Path) -> list[Fields]:
    """Return the files beside `path` that name special tokens; the first that names one decides."""
    settings = read_settings(path)
    sources = [settings]
    special_map = path.with_name("special_tokens_map.json")
    # transformers reads this file only for releases from before added_tokens_decoder.
    if "added_tokens_decoder" not in settings and special_map.exists():
        sources.insert(0, Fields.from_file(special_map))
    return sources


def _contents(fields: Fields, key: str) -> list[str]:
    """Return the texts of one setting: a token, a saved AddedToken, or a list of either."""
    value = fields.values.get(key)
    if isinstance(value, dict) and "content" not in value:
        value = list(value.values())
    contents = [_content(item) for item in (value if isinstance(value, list) else [value])]
    if None in contents and value is not None:
        raise fields.error(key, f"must hold tokens, found {short(value)}")
    return [content for content in contents if content]


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def named_bos(path: Path, token_id: Callable[[str], int | None], bos_ids: list[int]) -> int | None:
    """Return the id of the token that the files beside `path` name as BOS, else of `bos_ids`."""
    token = read_named_token(path, "bos_token")
    return token_id(token) if token is not None else next(iter(bos_ids), None)


def unknown_class(kind: str, known: Sequence[str], path: Path) -> VilaDeployError:
    return VilaDeployError(
        f"unknown tokenizer class {short(kind)} for it",
        where=path,
        fix=f"this version supports {', '.join(known)}, or give a tokenizer.json",
    )


def wrong_id(entry: AddedTokenEntry, number: int | None, path: Path) -> VilaDeployError:
    return VilaDeployError(
        f"token {short(entry.content)} has id {entry.number} in the files beside it, here {number}",
        where=path,
        fix=FIX,
    )
