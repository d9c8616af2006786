"""Seeded answers of one model and of ten people, for VQA accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

WORDS = (
    "red", "Red.", "two", "2", "a cat", "cat", "The cat!", "blue/red", "blue red", "dont", "don't",
    "10,000", "10000", "3.5", "it's", "its", "none", "0", "what?", "(b)", "b", "hes", "he's",
)  # fmt: skip


def vqa_cases(count: int = 80) -> Iterator[tuple[str, list[str]]]:
    """Yield an answer and ten right ones."""
    random = Random(20)
    for _ in range(count):
        few = random.sample(WORDS, 4)
        said = [random.choice(few) for _ in range(10)]
        yield random.choice([*said, random.choice(WORDS)]), said
