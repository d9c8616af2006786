"""MMBench: the published .tsv, images in base64."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from vila_deploy.harness.question import Question, TaskImage
from vila_deploy.harness.tasks.prompts import LETTER
from vila_deploy.harness.tasks.task import Task, group_score
from vila_deploy.processing.images import read_image_bytes
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
LETTERS = "ABCD"
# A question with its choices in another order has the first one's index and a multiple of this.
ROTATION = 1_000_000
MAX_FIELD_CHARACTERS = 64 << 20
# An image of fewer characters is the index of the row that holds it.
SHORTEST_IMAGE = 64
EMPTY = ("", "nan", "none")


def read_mmbench(folder: Path) -> Task:
    """Return the questions of the .tsv in a folder; a question counts if all its rotations do."""
    paths = sorted(folder.glob("*.tsv")) if folder.is_dir() else [folder]
    if len(paths) != 1:
        raise VilaDeployError(
            f"holds {len(paths)} .tsv files", where=folder, fix="give a folder with one of MMBench"
        )
    (path,) = paths
    rows = list(_rows(path))
    images = {row.text("index"): row.text("image") for row in rows}
    questions = tuple(_question(row, images) for row in rows)
    if not questions:
        raise VilaDeployError("holds no rows", where=path, fix="download it again")
    note = "letters are read from answers here; the authors' came from the benchmark's server"
    score = "questions right in every order of choices"
    return Task("mmbench", score, questions, group_score, ("MMB",), note)


def _rows(path: Path) -> Iterator[Fields]:
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise VilaDeployError(
                    f"has no column {missing[0]!r}",
                    where=path,
                    fix="give a split with answers, such as mmbench_dev_20230712.tsv",
                )
            for number, values in enumerate(reader, 2):
                yield Fields(dict(values), path, f"row {number}: ")
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise VilaDeployError(f"cannot be read ({error})", where=path, fix="download it") from error


def _question(row: Fields, images: dict[str, str]) -> Question:
    index = row.text("index")
    if not (index.isascii() and index.isdigit() and len(index) < 12):
        raise row.error("index", "must be a number")
    choices: list[str] = []
    for letter in LETTERS:
        if _is_empty(row.values.get(letter)):
            break
        choices.append(row.text(letter))
    answer = row.choice("answer", LETTERS[: len(choices)], what="letter")
    hint = row.values.get("hint")
    lines = [] if _is_empty(hint) else [str(hint)]
    lines += [row.text("question")]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    content = row.text("image")
    if len(content) < SHORTEST_IMAGE:
        content = images.get(content, "")
    where = f"{row.source}: {row.prefix}image"
    return Question(
        id=index,
        text="\n".join([*lines, LETTER]),
        answers=(answer,),
        metric="letter",
        images=(TaskImage(where, partial(_load, content, where)),),
        choices=tuple(choices),
        category=row.text("category"),
        group=str(int(index) % ROTATION),
    )


def _is_empty(value: object) -> bool:
    return value is None or str(value).lower() in EMPTY


def _load(content: str, where: str) -> Image.Image:
    try:
        return read_image_bytes(base64.b64decode(content), where)
    except (binascii.Error, ValueError) as error:
        raise VilaDeployError("is not base64", where=where, fix="download the file") from error
