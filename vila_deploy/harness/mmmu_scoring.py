"""Find the answer in free text and judge it as MMMU's own script does.

Source of the rules: mmmu/utils/eval_utils.py of MMMU-Benchmark/MMMU; tests/golden/mmmu_scores.json
holds what it says about 40 answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from random import Random
from string import ascii_uppercase

# The seed of the script, for answers in which it finds no choice.
GUESS_SEED = 42
OUTER_MARKS = ",.!?;:'"
LETTER_FORMS = ("({})", " {} ")
# Texts of choices are looked for in answers of more words than this.
SHORT_ANSWER_WORDS = 5
CONCLUSIONS = (
    "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ",
)  # fmt: skip
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
Value = str | float


def parse_choice(answer: str, choices: Sequence[str], guess: Random) -> str:
    """Return the letter that `find_choice` finds, else a drawn one."""
    return find_choice(answer, choices) or guess.choice(ascii_uppercase[: len(choices)])


def find_choice(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that `answer` names last; None if it names none.

    "(B)" counts before " B ", and both before the text of a choice.
    """
    for mark in OUTER_MARKS:
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = ascii_uppercase[: len(choices)]
    for form in LETTER_FORMS:
        if named := _last(answer, [(letter, form.format(letter)) for letter in letters]):
            return named
    if len(answer.split()) > SHORT_ANSWER_WORDS:
        texts = [choice.lower() for choice in choices]
        return _last(answer.lower(), list(zip(letters, texts, strict=True)))
    return None


def _last(answer: str, names: Sequence[tuple[str, str]]) -> str | None:
    """Return the letter of the name that begins last; the first of equals."""
    found = [(answer.rfind(name), letter) for letter, name in names if name in answer]
    return max(found, key=lambda place: place[0])[1] if found else None


def open_answer_is_right(answer: str, right: Sequence[str]) -> bool:
    """Return whether one of the values in `answer` equals a number or holds a text of `right`."""
    expected = [value for text in right for value in _values(text)]
    return any(_matches(value, expected) for value in parse_open(answer))


def parse_open(answer: str) -> list[Value]:
    """Return what `answer` may mean: its conclusions, and every number in them."""
    parts = list(_conclusions(answer)) or [answer.strip().strip(".").lower()]
    numbers = [found for part in parts for form in NUMBERS for found in form.findall(part)]
    return [value for text in (*parts, *numbers) for value in _values(text)]


def _matches(value: Value, expected: Collection[Value]) -> bool:
    if isinstance(value, str):
        return any(isinstance(text, str) and text in value for text in expected)
    return value in expected


def _conclusions(answer: str) -> Iterator[str]:
    """Yield the end of each line that has a word of conclusion, behind the last such word."""
    lines = answer.strip().strip(".").lower().split("\n")
    for number, line in enumerate(lines, 1):
        # The last line may be an equation.
        words = (*CONCLUSIONS, "=") if number == len(lines) else CONCLUSIONS
        shortest = ""
        for word in words:
            if word in line:
                tail = line.split(word)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in TRIVIAL:
            yield shortest


def _values(text: str) -> list[Value]:
    """Return a number, to two decimals, or the text in lower case.

    A single letter only counts beside a space, not within words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
