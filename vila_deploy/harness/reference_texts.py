"""Texts, and answered questions beside those of a task, to compare distributions on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila_deploy.data.examples import Example, load_held_out
from vila_deploy.harness.question import Question, TaskImage
from vila_deploy.utils.errors import VilaDeployError, short


@dataclass(frozen=True)
class ReferenceTexts:
    """Plain texts, and questions with their answers."""

    plain: tuple[str, ...]
    questions: tuple[Question, ...]


def read_reference_texts(path: Path | None, with_images: bool) -> ReferenceTexts:
    """Return the texts of a file or folder, or the built-in ones; see `load_held_out`.

    Args:
        with_images: False leaves out the built-in questions about images, where a task has its own.

    Raises:
        VilaDeployError: as `load_held_out`, or a question without an answer, or with earlier turns.
    """
    examples = load_held_out(path)
    plain = tuple(example.text for example in examples if example.is_plain)
    asked = [example for example in examples if not example.is_plain]
    if path is None:
        asked = [e for e in asked if _is_whole(e) and (with_images or not e.images)]
    for example in asked:
        if not _is_whole(example):
            raise VilaDeployError(
                f"has a question without one answer: {short(example.text)}",
                where=path,
                fix="give texts, and questions with their answers",
            )
    return ReferenceTexts(plain, tuple(map(_question, range(len(asked)), asked)))


def _is_whole(example: Example) -> bool:
    return example.answer is not None and not example.turns


def _question(number: int, example: Example) -> Question:
    images = tuple(TaskImage(image.name, image.load) for image in example.images)
    return Question(
        f"reference {number}", example.text, (example.answer or "",), "exact", images
    )  # fmt: skip
