"""How many questions a model answers exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from tiny_vila.questions import Question

Answer = Callable[[Sequence[Image.Image], str], str]


@dataclass(frozen=True)
class Score:
    """Right answers and questions, each by kind."""

    right: dict[str, int]
    asked: dict[str, int]

    @property
    def accuracy(self) -> float:
        """The share of right answers over all kinds, 0..1."""
        return sum(self.right.values()) / sum(self.asked.values())

    def table(self) -> str:
        """One line a kind, then the total."""
        rows = [(kind, self.right[kind], self.asked[kind]) for kind in sorted(self.asked)]
        rows.append(("all", sum(self.right.values()), sum(self.asked.values())))
        return "\n".join(
            f"{kind:18s} {right:4d} of {asked:4d}  {right / asked:7.2%}"
            for kind, right, asked in rows
        )


def score(
    answer: Answer,
    questions: Sequence[Question],
    on_wrong: Callable[[Question, str], None] | None = None,
    on_answer: Callable[[], None] = lambda: None,
) -> Score:
    """Asks every question; an answer counts if its text, without outer spaces, is the right one."""
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for question in questions:
        given = answer(question.images, question.prompt).strip()
        correct = given == question.answer
        asked[question.kind] = asked.get(question.kind, 0) + 1
        right[question.kind] = right.get(question.kind, 0) + correct
        if not correct and on_wrong:
            on_wrong(question, given)
        on_answer()
    return Score(right, asked)
