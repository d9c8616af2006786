"""GQA: testdev_balanced_questions.json and images/."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.harness.question import Question
from vila_deploy.harness.tasks.files import as_row, file_image, find_file, parse_json, read_text
from vila_deploy.harness.tasks.prompts import short_answer
from vila_deploy.harness.tasks.task import Task, mean_score
from vila_deploy.utils.errors import VilaDeployError

QUESTIONS, IMAGES = "testdev_balanced_questions.json", "images"


def read_gqa(folder: Path) -> Task:
    """Return the questions of the balanced test-dev split.

    Answers are compared as scripts/convert_gqa_for_eval.py of NVlabs/VILA at 0085724 hands them to
    GQA's eval.py.
    """
    path = find_file(folder, QUESTIONS)
    content = as_row(parse_json(read_text(path), path), path, "file").values
    questions = []
    for name, value in content.items():
        row = as_row(value, path, name)
        images = (file_image(folder / IMAGES, f"{row.text('imageId')}.jpg", row, "imageId"),)
        text, answers = short_answer(row.text("question")), (row.text("answer"),)
        questions.append(Question(name, text, answers, "gqa", images))
    if not questions:
        raise VilaDeployError("holds no questions", where=path, fix="download it again")
    return Task("gqa", "accuracy", tuple(questions), mean_score, ("GQA",))
