"""Bytes that a token stands for, from its name in the vocabulary."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_fallback_bytes(piece: str) -> bytes:
    """Return the bytes of a sentencepiece-like piece: \\u2581 is a space, <0x0A> a byte."""
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()


def is_byte_fallback(piece: str) -> bool:
    """Return whether a piece stands for one byte, as <0x0A> does."""
    return bool(_BYTE.fullmatch(piece))


def byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a piece of a byte-level vocabulary, where a character names a byte.

    A piece with other characters, as some vocabularies have, is taken as text.
    """
    names = byte_names()
    if any(character not in names for character in piece):
        return piece.encode()
    return bytes(names[character] for character in piece)


@cache
def byte_names() -> dict[str, int]:
    """Return the byte for each character, as GPT-2's `bytes_to_unicode` arranges them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in plain]
    named = {chr(byte): byte for byte in plain}
    return named | {chr(256 + number): byte for number, byte in enumerate(others)}


def is_byte_level(decoder: Any) -> bool:
    """Return whether a decoder of the `tokenizers` library is, or contains, a byte-level one."""
    return decoder is not None and "ByteLevel" in _kinds(json.loads(decoder.__getstate__()))


def _kinds(state: dict[str, Any]) -> set[str]:
    inner = [_kinds(item) for item in state.get("decoders", [])]
    return {state["type"]}.union(*inner)
