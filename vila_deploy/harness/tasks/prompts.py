"""The wording that the authors' scripts ask in."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

# llava/eval/mmmu_utils/configs/llava1.5.yaml, llava/eval/model_vqa_mmbench.py and
# model_vqa_science.py of NVlabs/VILA at 0085724.
LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return a question with its choices, "(A) …" a line, as MMMU asks it."""
    pairs = zip(ascii_uppercase, choices, strict=False)
    lines = "".join(f"({letter}) {choice}\n" for letter, choice in pairs)
    return f"{question}\n{lines}\n{LETTER}"


def short_answer(question: str) -> str:
    """Return a question that asks for a word or a phrase."""
    return f"{question}\n{SHORT}"
