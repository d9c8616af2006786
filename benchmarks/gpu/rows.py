"""The file of rows: one JSON object a line, of which the last may be broken off."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STEP_KERNELS = {
    "embed", "norm_qkv", "attention", "rope_attention", "add_residual", "gate_up", "head", "step",
}  # fmt: skip
# Kind of row → the checks that its kernels must have passed.
TIMED = {
    "step": STEP_KERNELS,
    "launch_mode": STEP_KERNELS,
    "kernel": STEP_KERNELS,
    "memory_limit": STEP_KERNELS | {"gemm", "dequantize", "rope_kv"},
    "session": STEP_KERNELS | {"gemm", "dequantize", "rope_kv", "sample"},
    "lookup": STEP_KERNELS | {"rope_kv"},
    "prefill": {"gemv", "gemm", "dequantize"},
    "product": {"gemv"},
    "step_products": {"gemv"},
}


def append(path: Path, row: Row) -> None:
    """Append a row; numbers that JSON doesn't have become null, with the reason."""
    bad = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    if bad:
        reason = ", ".join(f"{name} is {row[name]}" for name in bad)
        row = {**row, **dict.fromkeys(bad), "reason": row.get("reason") or reason}
    broken_off = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * broken_off + json.dumps(row, allow_nan=False) + "\n")


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read()


def read(path: Path) -> list[Row]:
    """Return the rows of a file that may not be there, without lines that are no objects."""
    found: list[Row] = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "kind" in row and "name" in row:
            found.append(row)
    return found


def disagreeing(rows: Iterable[Row], kind: str, name: str) -> list[str]:
    """Return the checks of this model's kernels that failed last, of those that a row rests on."""
    words = name.split()
    if kind in ("product", "step_products") and "ours" not in words:
        return []
    last = {row["name"]: row.get("agrees") for row in rows if row["kind"] == "check"}
    return sorted(
        check
        for check, agrees in last.items()
        if agrees is False and check.split()[0] in TIMED[kind] and check.split()[-1] == words[0]
    )


def best_mode(rows: Iterable[Row], model: str) -> str:
    """Return the fastest launch mode that gave a model equal bytes; the default without any.

    Of a mode that was timed again the last row counts.
    """
    timed = (row for row in rows if row["kind"] == "launch_mode")
    last = {row["name"]: row for row in timed if row["name"].startswith(f"{model} int4, ")}
    fine = [row for row in last.values() if row.get("same_bits") and row.get("agrees") is not False]
    if not fine:
        return "separate"
    fastest: str = max(fine, key=lambda row: row["tokens_per_s"])["name"]
    return fastest.rpartition(", ")[2]
