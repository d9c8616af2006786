"""MMMU's rules, against what its own script says about 40 answers."""

from __future__ import annotations

import ast
from random import Random

import pytest

from tests.support.mmmu_cases import cases, golden
from vila_deploy.harness.mmmu_scoring import (
    GUESS_SEED,
    find_choice,
    open_answer_is_right,
    parse_choice,
)


def test_40_answers_score_as_by_the_original() -> None:
    guess, scores = Random(GUESS_SEED), []
    for case in cases():
        right, options = case.row["answer"], ast.literal_eval(case.row["options"])
        if case.row["question_type"] == "open":
            answers = ast.literal_eval(right) if right.startswith("[") else [right]
            scores.append(int(open_answer_is_right(case.answer, answers)))
        else:
            scores.append(int(parse_choice(case.answer, options, guess) == right))
    assert scores == golden()["scores"]
    assert sum(scores) / len(scores) == golden()["accuracy"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("(B) or (A)", "A"), ("A (B)", "B"), ("b", None), ("x", None), ("it is a very red one", "A")],
)
def test_the_choice_named_last_counts(answer: str, letter: str | None) -> None:
    assert find_choice(answer, ["red", "blue"]) == letter
