"""ScienceQA-IMG: problems.json, LLaVA's llava_test_CQM-A.json and images/test/."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.harness.question import Question
from vila_deploy.harness.tasks.files import (
    as_row,
    file_image,
    find_file,
    identifier,
    parse_json,
    read_text,
    texts,
)
from vila_deploy.harness.tasks.prompts import LETTER
from vila_deploy.harness.tasks.task import Task, mean_score
from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

PROBLEMS, PROMPTS, IMAGES = "problems.json", "llava_test_CQM-A.json", "images/test"


def read_scienceqa(folder: Path) -> Task:
    """Return the test questions that have an image."""
    path, prompts = find_file(folder, PROBLEMS), find_file(folder, PROMPTS)
    problems = as_row(parse_json(read_text(path), path), path, "file").values
    rows = parse_json(read_text(prompts), prompts)
    if not isinstance(rows, list):
        raise VilaDeployError("must hold a list", where=prompts, fix="download it again")
    questions = [
        _question(folder, row, as_row(problems.get(identifier(row, "id")), path, _place(row)))
        for row in (as_row(value, prompts, f"[{number}]") for number, value in enumerate(rows))
        if "image" in row
    ]
    if not questions:
        raise VilaDeployError("holds no question with an image", where=prompts, fix="check it")
    return Task("scienceqa-img", "accuracy", tuple(questions), mean_score, ("SQA-I",))


def _place(row: Fields) -> str:
    return f"problem {identifier(row, 'id')}"


def _question(folder: Path, row: Fields, problem: Fields) -> Question:
    conversation = row.values.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise row.error("conversations", "must be a list of messages")
    first = as_row(conversation[0], row.source, f"{row.prefix}conversations[0]")
    asked = first.text("value").replace(IMAGE_MARKER, "").strip()
    choices = texts(problem, "choices")
    answer = problem.integer("answer", low=0, high=len(choices) - 1)
    images = (file_image(folder / IMAGES, row.text("image"), row),)
    right = (chr(ord("A") + answer),)
    return Question(
        identifier(row, "id"), f"{asked}\n{LETTER}", right, "science", images, choices
    )  # fmt: skip
