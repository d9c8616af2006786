"""40 made-up MMMU questions with answers: half a letter or a word, half free text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUBJECTS = ("Art_Theory", "Math")
WORDS = ("copper", "basalt", "a willow", "salt water", "Fig leaf", "Δ-shaped wing")


@dataclass(frozen=True)
class Case:
    """A question of MMMU's file, and what a model said."""

    subject: str
    row: dict[str, Any]
    answer: str


def cases() -> list[Case]:
    """Return the cases, subject by subject."""
    chosen = [_choice(number, text) for number, text in enumerate(_CHOICE_ANSWERS)]
    opened = [_open(number, *pair) for number, pair in enumerate(_OPEN_ANSWERS)]
    return chosen[:12] + opened[:8] + chosen[12:] + opened[8:]


# Behind each: how many choices, and the right one.
_CHOICE_ANSWERS: tuple[tuple[str, int, str], ...] = (
    ("B", 4, "B"),
    ("(C)", 4, "C"),
    ("D.", 4, "A"),
    ("a", 4, "A"),
    ("A, not B", 2, "B"),
    ("The answer is (B) because it shines.", 4, "B"),
    ("It can't be (A) or (D), so (C) it is, says the sign.", 4, "C"),
    ("Either A or C ; I would go with C", 3, "C"),
    ("I believe that the roof was covered with copper long ago", 4, "A"),
    ("Neither basalt nor copper will do here, it must be a Willow", 4, "C"),
    ("no idea", 4, "D"),
    ("I am not sure about any of these at all", 4, "C"),
    ("", 5, "B"),
    ("?!", 2, "A"),
    ("B: basalt", 4, "B"),
    ("The grey one. B", 4, "B"),
    ("Option E", 5, "E"),
    ("In my view salt water runs there, A is too dry", 4, "D"),
    ("it is basalt", 4, "B"),
    ("We see FIG LEAF on every page of that book", 5, "E"),
)
# Behind each: the right answer or answers.
_OPEN_ANSWERS: tuple[tuple[str, str | list[str]], ...] = (
    ("12", "12"),
    ("12.0", "12"),
    ("1,200", "1200"),
    ("0.333", "0.33"),
    ("Rome", "rome"),
    ("x", "X"),
    ("The length is 4 and the width is 3, so the area is 12.", "12"),
    ("area = 3 * 4 = 12.5", "12.5"),
    ("It was built by hand.\nTherefore the final answer is 1.5e3", "1500"),
    ("There could be -7 of them", "-7"),
    ("The matrix is [1, 2], the result 3", "2"),
    ("I count 17 birds and 4 nests", "17"),
    ("the capital could be Rome or Milan", ["Milan", "Turin"]),
    ("Thus it weighs about 3.14159 kg", "3.14"),
    ("nothing", "no"),
    ("The last line says\n7 = 7", "8"),
    ("It is :", "5"),
    ("inf", "inf"),
    ("So 1,234,567.", "1234567"),
    ("answer 2 result 22", ["22", "two"]),
)


def _choice(number: int, case: tuple[str, int, str]) -> Case:
    answer, count, right = case
    subject = SUBJECTS[number >= 12]
    row = {
        "id": f"validation_{subject}_{number + 1}",
        "question": f"Made-up question {number}: what does <image 1> show?",
        "options": repr(list(WORDS[:count])),
        "answer": right,
        "question_type": "multiple-choice",
    }
    return Case(subject, row, answer)


def _open(number: int, answer: str, right: str | list[str]) -> Case:
    subject = SUBJECTS[number >= 8]
    row = {
        "id": f"validation_{subject}_{number + 101}",
        "question": f"Made-up question {number}: how many are on <image 1>?",
        "options": "[]",
        "answer": right if isinstance(right, str) else repr(right),
        "question_type": "open",
    }
    return Case(subject, row, answer)


def golden() -> dict[str, Any]:
    """Return what the original script says: 1 or 0 a question, and the accuracy."""
    path = Path(__file__).parents[1] / "golden" / "mmmu_scores.json"
    values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return values
