"""Rows of other programs beside an engine: how they compare, and their Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vila_deploy.bench.table_markdown import DASH, markdown

Row = dict[str, Any]
OURS, SKIPPED = "vila-deploy", "skipped"
# Figures of one engine and of llama.cpp, by key; less is better.
FIGURES = {
    "prefill_256_s": "prefill of 256 tokens",
    "decode_0_ms": "decode at context 0",
    "decode_256_ms": "256",
    "decode_512_ms": "512",
    "decode_960_ms": "960",
}
PRODUCTS = {"products_1_ms": "1 token", "products_256_ms": "256 tokens"}


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds of one figure, and how many times as fast ours is in each round."""

    ours: float
    theirs: float
    ratios: tuple[float, ...]


def compare(rows: Sequence[Row], figure: str) -> Comparison | None:
    """Return ours beside the better setting of the other program; None where one has no figure.

    Rows of one round were measured right after each other, and are compared alone.
    """
    pairs = []
    for number in sorted({row["round"] for row in rows}):
        found = [row for row in rows if row["round"] == number and figure in row]
        own = [row[figure] for row in found if row["what"] == OURS]
        others = [row[figure] for row in found if row["what"] != OURS]
        if own and others:
            pairs.append((statistics.median(own), min(others)))
    if not pairs:
        return None
    ratios = sorted(theirs / own for own, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Comparison(ours, theirs, tuple(ratios))


def comparison_cells(rows: Sequence[Row], figure: str) -> list[str]:
    """Return ours, theirs and the ratio with its spread; dashes where one is missing."""
    found = compare(rows, figure)
    if found is None:
        return [DASH] * 3
    unit, ratios = "s" if figure.endswith("_s") else "ms", found.ratios
    ratio = f"{statistics.median(ratios):.2f}"
    if len(ratios) > 1:
        ratio += f" ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    return [f"{found.ours:.3g} {unit}", f"{found.theirs:.3g} {unit}", ratio]


def render_baselines(rows: Sequence[Row]) -> str:
    """Return the section of table.md about other programs; empty without rows."""
    if not rows:
        return ""
    parts = ["## Other programs on this computer"]
    measured = [row for row in rows if row["label"] == "measured"]
    engines = [row for row in measured if "round" in row]
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in engines):
        ours_and_theirs = [
            row for row in engines if (row["model"], row["precision"]) == (model, precision)
        ]
        parts.append(_engine_table(f"{model} {precision}", ours_and_theirs))
    products = [row for row in measured if any(name in row for name in PRODUCTS)]
    if products:
        parts.append(_product_table(products))
    reasons = [
        f"- {row['what']}{_shapes(row)}: skipped: {row['reason']}"
        for row in rows
        if row["label"] == SKIPPED
    ]
    if any(row.get("noisy") for row in measured):
        reasons.append("- **Noisy host**: other processes were at work before one of these ran.")
    return "\n\n".join([*parts, *(["\n".join(reasons)] if reasons else [])]) + "\n"


def _shapes(row: Row) -> str:
    return f", {row['model']} {row['precision']}" if "precision" in row else ""


def _engine_table(title: str, rows: Sequence[Row]) -> str:
    others = [row for row in rows if row["what"] != OURS]
    name = others[0]["what"] if others else "another program"
    body = [[label, *comparison_cells(rows, figure)] for figure, label in FIGURES.items()]
    return markdown([f"{title}, language model", OURS, name, "times as fast"], body)


def _product_table(rows: Sequence[Row]) -> str:
    model = rows[0]["model"]
    body = [
        [row["what"], *(f"{row[name]:.3g} ms" for name in PRODUCTS if name in row)] for row in rows
    ]
    titles = [f"products of {model}'s decoder alone", *PRODUCTS.values()]
    return markdown(titles, body)
