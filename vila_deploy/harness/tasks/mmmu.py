"""MMMU as the Hugging Face Hub has it: SUBJECT/validation-*.parquet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from vila_deploy.harness.question import MAX_CHOICES, Question, TaskImage
from vila_deploy.harness.tasks.files import as_row
from vila_deploy.harness.tasks.prompts import short_answer, with_choices
from vila_deploy.harness.tasks.task import Task, mean_score
from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.images import read_image_bytes
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.extras import install_extra
from vila_deploy.utils.fields import Fields

FILES = "*/validation-*.parquet"
COLUMNS = ("id", "question", "options", "answer", "question_type")
MULTIPLE_CHOICE, OPEN = "multiple-choice", "open"
MARKER = re.compile(r"<image (\d*)>")
MAX_LIST_CHARACTERS = 1 << 16


def read_mmmu(folder: Path) -> Task:
    """Return the questions of the validation split, subjects in alphabetical order.

    Images stand where <image 1> … are mentioned, as in llava/eval/mmmu_utils/data_utils.py of
    NVlabs/VILA at 0085724.
    """
    paths = sorted(folder.glob(FILES))
    if not paths:
        raise VilaDeployError(
            f"holds no {FILES}", where=folder, fix="give the copy of MMMU/MMMU from the hub"
        )
    questions = tuple(question for path in paths for question in _questions(path))
    note = "greedy answers; the authors drew from five beams"
    return Task("mmmu", "MMMU accuracy", questions, mean_score, ("MMMU val",), note)


def _questions(path: Path) -> Iterator[Question]:
    parquet = _pyarrow()
    try:
        table = parquet.read_table(path, columns=list(COLUMNS))
        rows = table.to_pylist()
        names = set(parquet.read_schema(path).names)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    for number, values in enumerate(rows):
        yield _question(as_row(values, path, f"row {number}"), path, number, names)


def _question(row: Fields, path: Path, number: int, columns: set[str]) -> Question:
    kind = row.choice("question_type", (MULTIPLE_CHOICE, OPEN), what="kind of question")
    options = _strings(row, "options")
    text, *choices = (MARKER.sub(IMAGE_MARKER, part) for part in (row.text("question"), *options))
    images = []
    for part in (row.text("question"), *options):
        for index in MARKER.findall(part):
            if f"image_{index}" not in columns:
                raise row.error("question", f"names image {short(index)}, which the file lacks")
            images.append(_image(path, number, f"image_{index}"))
    category, answer = path.parent.name, row.text("answer")
    if kind == OPEN:
        right = _strings(row, "answer") if answer.startswith("[") else (answer,)
        asked, metric, choices = short_answer(text), "mmmu-open", []
    else:
        if not 2 <= len(choices) <= MAX_CHOICES:
            raise row.error("options", f"holds {len(choices)} choices")
        right, asked, metric = (answer,), with_choices(text, choices), "choice"
    if answer == "?":
        raise row.error("answer", "is kept secret in this split", "give the validation split")
    identity = row.text("id")
    return Question(
        identity, asked, right, metric, tuple(images), tuple(choices), category.replace("_", " ")
    )


def _strings(row: Fields, key: str) -> tuple[str, ...]:
    """Return a list of strings that is written as Python writes it; nothing is executed."""
    text = row.text(key)
    try:
        value: Any = ast.literal_eval(text) if len(text) <= MAX_LIST_CHARACTERS else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise row.error(key, f"must be a list of strings, found {short(text)}")
    return tuple(value)


def _image(path: Path, number: int, column: str) -> TaskImage:
    return TaskImage(
        f"{path}: row {number}: {column}", partial(_load, path, number, column)
    )  # fmt: skip


def _load(path: Path, number: int, column: str) -> Image.Image:
    where = f"{path}: row {number}: {column}"
    value = _column(path, column)[number]
    content = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(content, bytes):
        raise VilaDeployError("is no image", where=where, fix="download the file again")
    return read_image_bytes(content, where)


@lru_cache(maxsize=8)
def _column(path: Path, column: str) -> list[Any]:
    """Return the images of a subject; questions are asked subject by subject."""
    try:
        values: list[Any] = _pyarrow().read_table(path, columns=[column])[column].to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    return values


def _unreadable(path: Path, error: Exception) -> VilaDeployError:
    what = f"is not the Parquet file that MMMU has ({short(str(error))})"
    return VilaDeployError(what, where=path, fix="download it again")


def _pyarrow() -> ModuleType:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise VilaDeployError(
            "MMMU's files are Parquet, which needs pyarrow",
            fix=install_extra("eval"),
        ) from error
    return parquet
