"""The report of vila-eval as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines."""
    if task := report["task"]:
        yield f"{task['task']}: {task['metric']} {_figure(task['score'])}"
        width = max(map(len, task["categories"]), default=0)
        for name, figure in task["categories"].items():
            yield f"  {(name or 'without').ljust(width)}  {_figure(figure)}"
        if task["protocol"]:
            yield f"  note: {task['protocol']}"
        yield from _published(task["published"])
    if likelihood := report["likelihood"]:
        for kind, quality in likelihood["quality"].items():
            if quality and kind != "all":
                yield f"{kind}: {_quality(quality)}"
    if report["out"]:
        yield f"answers: {report['out']}"


def _figure(figure: dict[str, Any]) -> str:
    interval = f"{figure['confidence']:.0%} interval {figure['low']:.1f} to {figure['high']:.1f}"
    return f"{figure['value']:.2f}% of {figure['count']} ({interval}, {figure['method']})"


def _published(rows: list[dict[str, Any]]) -> Iterator[str]:
    models = dict.fromkeys(row["model"] for row in rows)
    for model in models:
        scores = {row["precision"]: row["score"] for row in rows if row["model"] == model}
        both = ", ".join(f"{name} {score:g}" for name, score in scores.items())
        yield f"  published, {model}: {both}"


def _quality(quality: dict[str, Any]) -> str:
    interval = quality["kl_interval"]
    perplexity = f"{quality['perplexity_original']:.4g} → {quality['perplexity']:.4g}"
    kl = f"mean KL {quality['kl_mean']:.3g} ({interval['low']:.3g} to {interval['high']:.3g})"
    agreement = f"top-1 agreement {quality['top1_agreement']:.1%}"
    return f"perplexity {perplexity}, {kl}, {agreement}, {quality['tokens']} tokens"
