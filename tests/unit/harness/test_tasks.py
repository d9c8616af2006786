"""Benchmarks in the form of their published files: questions, prompts, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import eval_tasks
from tests.support.mmmu_cases import cases, golden
from vila_deploy.harness.question import Question
from vila_deploy.harness.report import score_answers, task_report
from vila_deploy.harness.tasks.gqa import read_gqa
from vila_deploy.harness.tasks.mmbench import read_mmbench
from vila_deploy.harness.tasks.mmmu import read_mmmu
from vila_deploy.harness.tasks.pope import read_pope
from vila_deploy.harness.tasks.scienceqa import read_scienceqa
from vila_deploy.harness.tasks.textvqa import read_textvqa

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def sizes(questions: Sequence[Question]) -> list[list[tuple[int, int]]]:
    return [[image.size for image in question.read_images()] for question in questions]


def test_textvqa_with_and_without_ocr_tokens(tmp_path: Path) -> None:
    plain = read_textvqa(eval_tasks.make_textvqa(tmp_path))
    assert plain.questions[0].text == f"What brand is it?\n{SHORT}"
    assert "without OCR tokens" in plain.protocol
    assert sizes(plain.questions) == [[(8, 8)], [(8, 8)]]
    answers = {question.id: "Bob." for question in plain.questions}
    # Seven of ten people: leaving out any one, at least six agree.
    assert [one.score for one in score_answers(plain, answers)] == [0, 1]
    prompted = read_textvqa(eval_tasks.add_ocr_prompts(tmp_path))
    (question,) = prompted.questions
    assert question.text.splitlines()[1] == "Reference OCR token: NOKIA"
    assert question.answers == ("nokia",) * 10
    assert not prompted.protocol


def test_pope_is_the_mean_f1_of_its_categories(tmp_path: Path) -> None:
    task = read_pope(eval_tasks.make_pope(tmp_path))
    assert task.questions[0].text == f"Is there a 0 in the image?\n{SHORT}"
    assert len({question.id for question in task.questions}) == 12
    # Always yes: precision 1/2, recall 1. Adversarial ones right: F1 1.
    answers = {
        q.id: q.answers[0] if q.category == "adversarial" else "Yes, there is."
        for q in task.questions
    }
    report = task_report(task, score_answers(task, answers))
    assert report["score"]["value"] == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)
    assert report["score"]["low"] < report["score"]["value"] <= report["score"]["high"]
    assert report["categories"]["popular"]["value"] == 50
    assert {row["label"] for row in report["published"]} == {"published"}
    assert any(row["score"] == 85.9 for row in report["published"])


def test_scienceqa_asks_what_has_an_image(tmp_path: Path) -> None:
    task = read_scienceqa(eval_tasks.make_scienceqa(tmp_path))
    (question,) = task.questions
    assert question.text == f"Which way?\nA. north\nB. south\n{LETTER}"
    assert question.answers == ("B",)
    assert sizes(task.questions) == [[(8, 8)]]


def test_gqa(tmp_path: Path) -> None:
    task = read_gqa(eval_tasks.make_gqa(tmp_path))
    assert [question.id for question in task.questions] == ["201", "202"]
    scored = score_answers(task, {"201": "Yes.", "202": "a car"})
    assert [one.score for one in scored] == [1, 0]


def test_mmbench_counts_a_question_that_is_right_in_every_order(tmp_path: Path) -> None:
    task = read_mmbench(eval_tasks.make_mmbench(tmp_path))
    first, rotated, last = task.questions
    assert first.text == f"Look.\nWhich?\nA. yes\nB. no\n{LETTER}"
    assert last.text == f"How?\nA. well\nB. badly\nC. not\n{LETTER}"
    assert sizes(task.questions) == [[(16, 16)]] * 3
    for answers, expected in ((("A", "B", "C"), 100), (("A", "A", "C"), 50)):
        said = dict(zip((first.id, rotated.id, last.id), answers, strict=True))
        report = task_report(task, score_answers(task, said))
        assert (report["score"]["value"], report["score"]["count"]) == (expected, 2)


def test_mmmu_scores_as_the_original(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="MMMU's files need the extra [eval]")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = eval_tasks.write_image(tmp_path / "a.png").read_bytes()
    for subject in {case.subject for case in cases()}:
        rows = [
            {**case.row, "image_1": {"bytes": content, "path": "a.png"}, "image_2": None}
            for case in cases()
            if case.subject == subject
        ]
        (tmp_path / subject).mkdir()
        path = tmp_path / subject / "validation-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    task = read_mmmu(tmp_path)
    assert len(task.questions) == 40
    assert task.questions[0].text == (
        "Made-up question 0: what does <image> show?\n"
        f"(A) copper\n(B) basalt\n(C) a willow\n(D) salt water\n\n{LETTER}"
    )
    assert sizes(task.questions) == [[(8, 8)]] * 40
    scored = score_answers(task, {case.row["id"]: case.answer for case in cases()})
    assert [one.score for one in scored] == golden()["scores"]
    assert task_report(task, scored)["score"]["value"] == 100 * golden()["accuracy"]
