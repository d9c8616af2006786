"""A folder of one's own: questions.jsonl and the images that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila_deploy.harness.metrics import OWN_METRICS
from vila_deploy.harness.question import MAX_CHOICES, Question, TaskImage
from vila_deploy.harness.tasks.files import file_image, find_file, identifier, rows_of, texts
from vila_deploy.harness.tasks.prompts import with_choices
from vila_deploy.harness.tasks.task import Task, mean_score
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

QUESTIONS = "questions.jsonl"
KEYS = ("id", "image", "question", "answer", "choices", "metric", "category")


def read_own(folder: Path, metric: str | None = None) -> Task:
    """Return the task in a folder.

    Args:
        metric: of rows that name none; None: "choice" for those with choices, else "exact".

    Raises:
        VilaDeployError: names the line and key that is wrong, or the image that is missing.
    """
    path = find_file(folder, QUESTIONS)
    questions = [_question(row, folder, number, metric) for number, row in enumerate(rows_of(path))]
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            what = f"two rows have the id {short(question.id)}"
            raise VilaDeployError(what, where=path, fix="give each its own, or none")
        seen.add(question.id)
    metrics = sorted({question.metric for question in questions})
    return Task(folder.name, " and ".join(metrics), tuple(questions), mean_score)


def _question(row: Fields, folder: Path, number: int, metric: str | None) -> Question:
    for key in row.values:
        if key not in KEYS:
            raise row.error(short(key), "unknown key", f"the keys are {', '.join(KEYS)}")
    text = row.text("question")
    choices = texts(row, "choices") if "choices" in row else ()
    if not choices:
        metric = row.choice("metric", OWN_METRICS, metric or "exact", what="metric")
        if metric == "choice":
            raise row.error("choices", "is missing", "metric choice needs choices")
        return _row(row, folder, number, text, _answers(row), metric)
    if len(choices) > MAX_CHOICES:
        raise row.error("choices", f"holds {len(choices)}", f"give at most {MAX_CHOICES}")
    if row.choice("metric", OWN_METRICS, "choice", what="metric") != "choice":
        raise row.error("metric", "is another than choice", "leave it out where there are choices")
    letters = tuple(_letter(row, answer, choices) for answer in _answers(row))
    text = with_choices(text, choices)
    return _row(row, folder, number, text, letters, "choice", choices)


def _row(
    row: Fields,
    folder: Path,
    number: int,
    text: str,
    answers: tuple[str, ...],
    metric: str,
    choices: tuple[str, ...] = (),
) -> Question:
    return Question(
        id=identifier(row, "id") if "id" in row else str(number),
        text=text,
        answers=answers,
        metric=metric,
        images=_images(row, folder),
        choices=choices,
        category=row.text("category") if "category" in row else None,
    )


def _images(row: Fields, folder: Path) -> tuple[TaskImage, ...]:
    value = row.values.get("image")
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise row.error("image", f"must be a path or a list of paths, found {short(name)}")
    return tuple(file_image(folder, name, row) for name in names)


def _answers(row: Fields) -> tuple[str, ...]:
    """Return the right answers; a number stands for how it is written."""
    value: Any = row.values.get("answer")
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(v) in (str, int, float) for v in values):
        what = f"must be a text, a number or a list of those, found {short(value)}"
        raise row.error("answer", what, "give the right answer, or a list of them")
    return tuple(map(str, values))


def _letter(row: Fields, answer: str, choices: tuple[str, ...]) -> str:
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    if answer in letters:
        return answer
    if choices.count(answer) == 1:
        return letters[choices.index(answer)]
    what = f"is neither a letter, A to {letters[-1]}, nor one of the choices: {short(answer)}"
    raise row.error("answer", what)
