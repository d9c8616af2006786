"""Pieces of an answer, cut at stop strings wherever tokens end."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from vila_deploy.runtime.answer_text import AnswerText


class Letters:
    """A tokenizer whose tokens are characters."""

    bos_ids: Sequence[int] = ()
    vocab_size = 128

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Pairs(Letters):
    """A tokenizer with tokens of two characters."""

    def encode(self, text: str) -> list[int]:
        padded = text + "\0" * (len(text) % 2)
        return [
            ord(first) * 256 + ord(second)
            for first, second in zip(padded[::2], padded[1::2], strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i // 256) + chr(i % 256) for i in ids).replace("\0", "")


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the stop string that is complete first, letter by letter."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def pieces(text: str, tokenizer: Letters, stop: Sequence[str], strip: bool) -> list[str]:
    answer = AnswerText(tokenizer, stop, strip)  # type: ignore[arg-type]
    shown = []
    for token in tokenizer.encode(text):
        shown.append(answer.push(token))
        if answer.stopped:
            break
    return [*shown, answer.finish()]


@pytest.mark.parametrize("tokenizer", [Letters(), Pairs()])
def test_pieces_are_the_text_before_the_stop_string(tokenizer: Letters) -> None:
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices("ab \n", k=generator.randrange(12)))
        stop = [
            "".join(generator.choices("ab ", k=generator.randrange(1, 4)))
            for _ in range(generator.randrange(3))
        ]
        assert "".join(pieces(text, tokenizer, stop, strip=False)) == cut(text, stop)
        expected = cut(text.lstrip(), stop).rstrip()
        assert "".join(pieces(text, tokenizer, stop, strip=True)) == expected


def test_text_is_shown_as_soon_as_it_is_decided() -> None:
    assert pieces("abxyab", Letters(), ["xyz"], strip=True) == ["a", "b", "", "", "xya", "b", ""]
    assert pieces("a  b ", Letters(), [], strip=True) == ["a", "", "", "  b", "", ""]
    assert pieces("a b ", Letters(), [], strip=False) == ["a", " ", "b", " ", ""]
    assert pieces("abxyz", Letters(), ["xyz"], strip=True) == ["a", "b", "", "", "", ""]
