"""Put scores together: the figure, its categories, the authors' figures beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from vila_deploy.bench.published import read_published
from vila_deploy.harness.figures import share
from vila_deploy.harness.metrics import METRICS
from vila_deploy.harness.mmmu_scoring import GUESS_SEED
from vila_deploy.harness.question import Question
from vila_deploy.harness.tasks.task import Task


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and its score, 0 to 1."""

    question: Question
    answer: str
    score: float


def score_answers(task: Task, answers: Mapping[str, str]) -> list[ScoredAnswer]:
    """Score answers by question id, in the task's order, in which guesses are drawn."""
    guess = Random(GUESS_SEED)
    return [
        ScoredAnswer(q, answers[q.id], METRICS[q.metric](answers[q.id], q, guess))
        for q in task.questions
        if q.id in answers
    ]


def task_report(task: Task, scored: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """Return a task's part of the report; scores are in percent.

    Args:
        scored: at least one.
    """
    scores = [one.score for one in scored]
    figure = task.summarize([one.question for one in scored], scores).percent()
    return {
        "task": task.name,
        "metric": task.score,
        "questions": len(task.questions),
        "answered": len(scored),
        "score": figure.to_json(),
        "categories": _categories(scored),
        "protocol": task.protocol or None,
        "published": published_scores(task.benchmarks),
    }


def _categories(scored: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """Return the mean score of each category; none where there is but one."""
    places: dict[str, list[float]] = {}
    for one in scored:
        places.setdefault(one.question.category or "", []).append(one.score)
    if len(places) < 2:
        return {}
    return {name: share(scores).percent().to_json() for name, scores in places.items()}


def published_scores(benchmarks: Sequence[str]) -> list[dict[str, Any]]:
    """Return the authors' scores on these benchmarks, each labelled as published."""
    return [
        {
            "label": "published",
            "model": row["model"],
            "precision": row["precision"],
            "benchmark": row["benchmark"],
            "score": float(row["score"]),
            "source": row["source"],
        }
        for row in read_published("accuracy")
        if row["benchmark"] in benchmarks
    ]
