"""A task: its questions, and how their scores become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vila_deploy.harness.figures import Figure, share
from vila_deploy.harness.question import Question

DEFAULT_NEW_TOKENS = 128
Summary = Callable[[Sequence[Question], Sequence[float]], Figure]


@dataclass(frozen=True)
class Task:
    """Questions and what is known about them.

    Args:
        score: what the summary is, for people.
        protocol: how our way of asking differs from the authors', if it does.
        summarize: questions and the score of each → the figure.
        benchmarks: the columns of the authors' table that it is comparable with.
    """

    name: str
    score: str
    questions: tuple[Question, ...]
    summarize: Summary
    benchmarks: tuple[str, ...] = ()
    protocol: str = ""


def mean_score(questions: Sequence[Question], scores: Sequence[float]) -> Figure:
    """Return the mean over questions."""
    return share(scores)


def group_score(questions: Sequence[Question], scores: Sequence[float]) -> Figure:
    """Return the share of groups whose questions are all right."""
    groups: dict[str, float] = {}
    for question, score in zip(questions, scores, strict=True):
        name = question.group or question.id
        groups[name] = min(score, groups.get(name, 1.0))
    return share(list(groups.values()))
