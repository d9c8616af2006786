"""Write benchmark rows as Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

# Titles that differ in a table with rows of a GPU.
PEAK, SHARE = "peak MB", "of read bandwidth"
TITLES_WITH_GPU = {PEAK: "host peak MB", SHARE: "of bandwidth"}


def _share(row: Row) -> str:
    if row["roofline_fraction"] is None:
        return "?"
    share = f"{row['roofline_fraction']:.0%} of {row['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s"
    return f"{share} (published)" if row["bandwidth_label"] == "published" else share


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "precision": lambda row: row["precision"],
    "target": lambda row: row["target"],
    "backend": lambda row: row["backend"],
    "weights": lambda row: row["weights"],
    "tokens/s": lambda row: f"{row['decode_tokens_per_s']:.1f}",
    "first token ms": lambda row: f"{row['ttft_ms']['total']:.0f}",
    "(preprocess + vision + prefill)": lambda row: " + ".join(
        f"{row['ttft_ms'][part]:.0f}" for part in ("preprocess", "vision", "prefill")
    ),
    PEAK: lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}",
    "MB/token": lambda row: f"{row['weight_bytes_per_token'] / 1e6:.1f}",
    SHARE: _share,
}


def _on_gpu(row: Row) -> bool:
    return "host" in row


def render_rows(rows: Sequence[Row], style: str) -> str:
    """Return `rows` as "md", "csv" (flat keys, full precision) or "json"."""
    return {"md": _markdown, "csv": _csv, "json": _json}[style](rows)


def _json(rows: Sequence[Row]) -> str:
    return json.dumps(list(rows), indent=2)


def _markdown(rows: Sequence[Row]) -> str:
    renamed = TITLES_WITH_GPU if any(map(_on_gpu, rows)) else {}
    titles = [renamed.get(title, title) for title in COLUMNS]
    cells = [titles, *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    devices = "; ".join(dict.fromkeys(map(_measured_on, rows)))
    return "\n".join([lines[0], rule, *lines[1:], "", devices])


def _measured_on(row: Row) -> str:
    host = f", host {row['host']}" if _on_gpu(row) else ""
    return f"{row['label']} on {row['device']}{host}"


def _csv(rows: Sequence[Row]) -> str:
    flat = [_flatten(row) for row in rows]
    out = io.StringIO()
    # Rows of a GPU and of a CPU don't have all keys in common.
    keys = list(dict.fromkeys(key for row in flat for key in row))
    writer = csv.DictWriter(out, fieldnames=keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().rstrip("\n")


def _flatten(row: Row, prefix: str = "") -> Row:
    """Return `row` with the keys of inner objects joined by dots; lists become JSON."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return flat
