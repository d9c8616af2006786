"""Metrics, against the originals' figures where there are such."""

from __future__ import annotations

import json
from random import Random

import pytest

from tests.support.paths import REPOSITORY
from tests.support.vqa_cases import vqa_cases
from vila_deploy.harness.edit_distance import edit_distance
from vila_deploy.harness.metrics import METRICS
from vila_deploy.harness.question import Question


def score(metric: str, answer: str, *right: str, choices: tuple[str, ...] = ()) -> float:
    question = Question("1", "?", right, metric, choices=choices)
    return METRICS[metric](answer, question, Random(0))


def test_vqa_accuracy_is_that_of_the_originals_evaluator() -> None:
    path = REPOSITORY / "tests" / "golden" / "vqa_scores.json"
    expected = json.loads(path.read_text("utf-8"))["scores"]
    scores = [score("vqa", answer, *right) for answer, right in vqa_cases()]
    assert scores == pytest.approx(expected, abs=1e-12)
    assert len({round(value, 3) for value in scores}) >= 4


def test_vqa_of_a_few_answers_is_all_or_nothing() -> None:
    assert score("vqa", "The two cats.", "2 cats") == 1
    assert score("vqa", "three cats", "2 cats", "two dogs") == 0


def test_edit_distance_is_that_of_the_recursive_definition() -> None:
    def plain(first: str, second: str) -> int:
        if not first or not second:
            return len(first) + len(second)
        replaced = plain(first[1:], second[1:]) + (first[0] != second[0])
        return min(replaced, plain(first[1:], second) + 1, plain(first, second[1:]) + 1)

    random = Random(3)
    for _ in range(60):
        words = ["".join(random.choices("abc", k=random.randint(0, 5))) for _ in range(2)]
        assert edit_distance(*words) == plain(*words)


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("Invoice  12", "invoice 12", 1.0),
        ("invoice 13", "invoice 12", 0.9),
        ("x", "invoice 12", 0.0),
        ("abcd", "abxy", 0.5),
        ("", "", 1.0),
        ("invoice 12 " * 5000, "invoice 12", 0.0),
    ],
)
def test_anls(answer: str, right: str, expected: float) -> None:
    assert score("anls", answer, right) == pytest.approx(expected)


def test_anls_takes_the_closest_answer() -> None:
    assert score("anls", "abcd", "zzzz", "abce") == 0.75


@pytest.mark.parametrize(
    ("metric", "answer", "right", "expected"),
    [
        ("exact", " red ", "red", 1), ("exact", "Red", "red", 0),
        ("gqa", "Red.", "red", 1), ("gqa", "dark red", "red", 0),
        ("yes-no", "No, there is none. Yes", "no", 1), ("yes-no", "Yes. no", "yes", 1),
        ("yes-no", "nothing", "no", 0), ("yes-no", "there is not", "no", 1),
        ("science", "B", "B", 1), ("science", "B. north", "B", 1), ("science", "B north", "B", 0),
        ("science", "The answer is B.", "B", 1), ("science", "C", "C", 0),
        ("science", "", "B", 0), ("letter", "B. blue", "B", 1), ("letter", "blue", "B", 0),
        ("letter", "the colour of this one is blue", "B", 1), ("letter", "B", "A", 0),
    ],
)  # fmt: skip
def test_rules_of_benchmarks(metric: str, answer: str, right: str, expected: int) -> None:
    assert score(metric, answer, right, choices=("red", "blue")) == expected
