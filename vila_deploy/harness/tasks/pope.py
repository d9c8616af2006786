"""POPE: coco_pope_random.json, …_popular and …_adversarial, and COCO's val2014/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vila_deploy.harness.figures import Figure, bootstrap
from vila_deploy.harness.question import Question
from vila_deploy.harness.tasks.files import file_image, find_file, identifier, rows_of
from vila_deploy.harness.tasks.prompts import short_answer
from vila_deploy.harness.tasks.task import Task

CATEGORIES = ("adversarial", "popular", "random")
IMAGES, YES, NO = "val2014", "yes", "no"


def read_pope(folder: Path) -> Task:
    """Return the questions of the three files, each a category."""
    questions = tuple(q for category in CATEGORIES for q in _questions(folder, category))
    return Task("pope", "F1, mean of the categories", questions, mean_f1, ("POPE",))


def _questions(folder: Path, category: str) -> list[Question]:
    name = f"coco_pope_{category}.json"
    found = []
    for row in rows_of(find_file(folder, f"coco/{name}", name)):
        label = row.choice("label", (YES, NO), what="label")
        images = (file_image(folder / IMAGES, row.text("image"), row),)
        identity = f"{category} {identifier(row, 'question_id')}"
        text = short_answer(row.text("text"))
        found.append(Question(identity, text, (label,), "yes-no", images, category=category))
    return found


def mean_f1(questions: Sequence[Question], scores: Sequence[float]) -> Figure:
    """Return the mean over categories of F1, "yes" being what is to be found.

    Source: llava/eval/eval_pope.py of NVlabs/VILA at 0085724; the authors' tables give the mean.
    """
    right = np.array(scores) > 0
    wanted = np.array([YES in question.answers for question in questions])
    said = np.where(right, wanted, ~wanted)
    names, category = np.unique([q.category or "" for q in questions], return_inverse=True)

    def statistic(places: np.ndarray) -> float:
        kinds, true, positive = category[places], wanted[places], said[places]

        def counted(chosen: np.ndarray) -> np.ndarray:
            return np.bincount(kinds[chosen], minlength=len(names))

        total = counted(true) + counted(positive)
        f1 = 2 * counted(true & positive) / np.maximum(total, 1)
        return float(f1.mean())

    return bootstrap(len(questions), statistic)
