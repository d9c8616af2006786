"""`python -m benchmarks.gpu.plot ROWS.jsonl`: bytes per second over bytes read, with ceilings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.rows import Row, read


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Write a PNG; False where matplotlib is missing or nothing was timed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    timed = [row for row in rows if "bytes" in row and "bytes_per_s" in row]
    if not timed:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for series in sorted({_series(row) for row in timed}):
        points = sorted(
            (row["bytes"], row["bytes_per_s"]) for row in timed if _series(row) == series
        )
        marker = "o" if series.startswith(("ours", "step")) else "x"
        axes.plot(*zip(*points, strict=True), marker=marker, linestyle="", label=series)
    for row in rows:
        if row["kind"] == "stream" and "bytes_per_s" in row:
            axes.axhline(row["bytes_per_s"], linestyle="--", linewidth=1, color="grey")
            axes.annotate(row["name"], (min(r["bytes"] for r in timed), row["bytes_per_s"]))
    axes.set(xscale="log", yscale="log", xlabel="bytes read", ylabel="bytes per second")
    label, device = timed[0]["label"], timed[0]["device"]
    axes.set_title(f"{label} on {device}, commit {timed[0]['commit']}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def _series(row: Row) -> str:
    """Return what is compared: the implementation, or whole steps of a precision."""
    words = row["name"].split()
    return f"step {words[1]}" if row["kind"] == "step" else " ".join(words[2:4])


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(plot(read(source), source.with_suffix(".png")))
