"""questions.jsonl of one's own: what it may hold, and one line for what it may not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.support.eval_tasks import MAKERS, make_own, write_lines
from vila_deploy.harness.report import score_answers, task_report
from vila_deploy.harness.tasks.own import read_own
from vila_deploy.harness.tasks.registry import PUBLISHED
from vila_deploy.harness.tasks.task import Task
from vila_deploy.utils.errors import VilaDeployError


def test_rows_of_every_kind(tmp_path: Path) -> None:
    task = read_own(make_own(tmp_path))
    assert [q.metric for q in task.questions] == [
        "exact", "exact", "choice", "choice", "anls", "vqa",
    ]  # fmt: skip
    assert [q.answers for q in task.questions[:4]] == [("red",), ("2",), ("B",), ("A",)]
    assert task.questions[2].text.splitlines()[1:3] == ["(A) yes", "(B) no"]
    assert [q.id for q in task.questions] == ["0", "1", "2", "x", "4", "5"]
    answers = dict(zip("0123x45", ["red", "3", "B", "", "(A)", "nos", "man"], strict=True))
    scored = score_answers(task, answers)
    assert [one.score for one in scored] == pytest.approx([1, 0, 1, 1, 2 / 3, 1])
    report = task_report(task, scored)
    assert report["score"]["method"].startswith("bootstrap")
    assert set(report["categories"]) == {"colour", "people", ""}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answer": "a"}, "question: is missing"),
        ({"question": 7, "answer": "a"}, "question: must be a string"),
        ({"question": "?"}, "answer: must be a text"),
        ({"question": "?", "answer": []}, "answer: must be a text"),
        ({"question": "?", "answer": True}, "answer: must be a text"),
        ({"question": "?", "answer": {"a": 1}}, "answer: must be a text"),
        ({"question": "?", "answer": "a", "image": "none.png"}, "no such image"),
        ({"question": "?", "answer": "a", "image": "a\0b"}, "no such image"),
        ({"question": "?", "answer": "a", "image": "pipe"}, "no such image"),
        ({"question": "?", "answer": "a", "image": "."}, "no such image"),
        ({"question": "?", "answer": "a", "image": "https://a.org/b.png"}, "is a URL"),
        ({"question": "?", "answer": "a", "image": [3]}, "must be a path"),
        ({"question": "?", "answer": "a", "metric": "bleu"}, "unknown metric"),
        ({"question": "?", "answer": "a", "metric": "choice"}, "needs choices"),
        ({"question": "?", "answer": "C", "choices": ["a", "b"]}, "neither a letter"),
        ({"question": "?", "answer": "a", "choices": ["a", "a"]}, "neither a letter"),
        ({"question": "?", "answer": "A", "choices": "ab"}, "must be a list of strings"),
        ({"question": "?", "answer": "A", "choices": ["x"] * 27}, "at most 26"),
        ({"question": "?", "answer": "A", "choices": ["a"], "metric": "vqa"}, "another than"),
        ({"question": "?", "answer": "a", "choises": ["a"]}, "unknown key"),
        ({"question": "?", "answer": "a", "id": None, "category": 3}, "category: must be"),
        ({"question": "?", "answer": "a", "id": [1]}, "id: must be"),
        ([1], "is no JSON object"),
    ],
)
def test_a_wrong_row_is_one_line(tmp_path: Path, row: Any, words: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    write_lines(tmp_path / "questions.jsonl", [{"question": "?", "answer": "a"}, row])
    with pytest.raises(VilaDeployError, match="line 2") as error:
        read_own(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match="no such folder"):
        read_own(tmp_path / "gone")
    with pytest.raises(VilaDeployError, match="no such file"):
        read_own(tmp_path)
    for content, words in ((b"", "no rows"), (b"\xff\xfe", "not UTF-8"), (b"[" * 9999, "JSON")):
        (tmp_path / "questions.jsonl").write_bytes(content)
        with pytest.raises(VilaDeployError, match=words):
            read_own(tmp_path)
    write_lines(tmp_path / "questions.jsonl", [{"question": "?", "answer": "a", "id": "n"}] * 2)
    with pytest.raises(VilaDeployError, match="two rows have the id"):
        read_own(tmp_path)


VALUES = (
    None,
    True,
    -1,
    0,
    1e400,
    "",
    "\ud800",
    "x" * 3000,
    [],
    [[]],
    {},
    {"a": {}},
    "../..",
    "\0",
)


@pytest.mark.parametrize("name", MAKERS)
def test_300_mutations_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """Bytes of any file are damaged, or a value of its JSON is another."""
    folder = MAKERS[name](tmp_path)
    read = PUBLISHED.get(name, read_own)
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".tsv")]
    random, refused = Random(5), 0
    for number in range(300):
        path = random.choice(files)
        original = path.read_bytes()
        path.write_bytes(_damaged(original, random) if number % 2 else _other(original, random))
        error = _problem(lambda: read(folder))
        path.write_bytes(original)
        assert "\n" not in error
        refused += bool(error)
    assert 50 < refused < 300


def _problem(read: Callable[[], Task]) -> str:
    try:
        task = read()
    except VilaDeployError as error:
        return str(error)
    scored = score_answers(task, {q.id: "(A) yes" for q in task.questions})
    task_report(task, scored)
    return ""


def _damaged(content: bytes, random: Random) -> bytes:
    place, length = random.randrange(len(content)), random.choice((1, 2, 9))
    middle = random.choice((b"", random.randbytes(length), content[:length]))
    return content[:place] + middle + content[place + length :]


def _other(content: bytes, random: Random) -> bytes:
    """Replace one value of JSON, or of JSON lines; other files lose a piece."""
    lines = content.decode().splitlines()
    place = random.randrange(len(lines))
    try:
        value = json.loads(lines[place])
    except ValueError:
        return content[: random.randrange(len(content))]
    lines[place] = json.dumps(_replaced(value, random))
    return "\n".join(lines).encode()


def _replaced(value: Any, random: Random) -> Any:
    if isinstance(value, dict | list) and value and random.random() < 0.9:
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = _replaced(value[key], random)
        return value
    return random.choice(VALUES)
