"""Rows that tables are made of, and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
PRECISIONS = ("int4", "fp16")
# The computer whose `vila-bench --table` gives the figures of a CPU, README's too.
CPU_TABLE = "authors-table-epyc"
Row = dict[str, Any]
Cells = Sequence[str]


@cache
def results(name: str) -> tuple[Row, ...]:
    """Return the rows of `results/NAME.jsonl`."""
    lines = (RESULTS / f"{name}.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def measured_on_cpu() -> dict[tuple[str, str], Row]:
    """Return the measured rows of CPU_TABLE by model and precision, the last of each."""
    measured = (row for row in results(CPU_TABLE) if row["label"] == "measured")
    return {(row["model"], row["precision"]): row for row in measured}


def markdown(titles: Cells, rows: Iterable[Cells], note: str = "") -> str:
    """Return a Markdown table, with `note` as a paragraph below it."""
    lines = [titles, ["---"] * len(titles), *rows]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"{text}\n{note}\n" if note else text
