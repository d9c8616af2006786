"""The figures that the authors of VILA publish: speed.csv and accuracy.csv, with their sources."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

Row = dict[str, str]
OUT_OF_MEMORY, NOT_GIVEN = "out of memory", "not given"


@cache
def read_published(name: str) -> tuple[Row, ...]:
    """Return the rows of `NAME.csv`, "speed" or "accuracy", every value as it is printed there."""
    file = resources.files(__name__) / f"{name}.csv"
    return tuple(csv.DictReader(file.read_text("utf-8").splitlines()))


@cache
def published_speed(model: str, precision: str, target: str) -> str | None:
    """Return the authors' decode tokens/s; OUT_OF_MEMORY, NOT_GIVEN, or None without such a row."""
    for row in read_published("speed"):
        if (row["model"], row["precision"], row["target"]) == (model, precision, target):
            return row["decode_tokens_per_s"]
    return None


def published_models() -> list[str]:
    """Return every model of speed.csv in the authors' order."""
    return list(dict.fromkeys(row["model"] for row in read_published("speed")))
