"""Plots of a filled table as SVG and PNG; needs matplotlib, which extra [plots] has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vila_deploy.bench.published import published_speed
from vila_deploy.bench.roofline import DEVICES, roofline
from vila_deploy.checkpoint.presets import PRESETS
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.extras import install_extra

Row = dict[str, Any]
FORMATS = ("svg", "png")
TTFT_PARTS = ("preprocess", "vision", "prefill")
# Of the devices with published figures, one colour each; rooflines are hollow marks in it.
COLOURS = {"a100": "#0072B2", "rtx4090": "#009E73", "orin": "#D55E00", "h100": "#CC79A7",
           "h200": "#56B4E9"}  # fmt: skip
HERE = "#111111"


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the plots that the rows have figures for, and return their files.

    Raises:
        VilaDeployError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise VilaDeployError(
            "no plots: matplotlib is not installed", fix=install_extra("plots")
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vila-deploy"  # equal figures are equal files
    from matplotlib import pyplot

    shown = [row for row in rows if row["label"] in ("measured", "predicted")]
    measured = [row for row in shown if row["label"] == "measured"]
    plots: dict[str, tuple[Callable[[Any, list[Row]], None], list[Row]]] = {
        "decode-speed": (_plot_speed, [row for row in rows if row["model"] in PRESETS]),
        "first-token": (_plot_first_token, measured),
        "decode-by-context": (_plot_contexts, [row for row in shown if row.get("contexts")]),
    }
    files = []
    for name, (draw, drawn) in plots.items():
        if not drawn:
            continue
        figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.45 * max(len(drawn), 5)))
        draw(axes, drawn)
        for ending in FORMATS:
            path = folder / f"{name}.{ending}"
            metadata = {"Date": None} if ending == "svg" else None
            figure.savefig(path, bbox_inches="tight", dpi=150, metadata=metadata)
            files.append(path)
        pyplot.close(figure)
    return files


def _titles(rows: Sequence[Row]) -> list[str]:
    return [f"{row['model']} {row['precision']}" for row in rows]


def _plot_speed(axes: Any, rows: list[Row]) -> None:
    """One line for each model: here, published, roofline, on a logarithmic axis."""
    for place, row in enumerate(rows):
        for device, colour in COLOURS.items():
            limit = roofline(row["model"], row["precision"], device)
            axes.plot(limit, place, "o", mfc="none", mec=colour, ms=7)
            published = published_speed(row["model"], row["precision"], device) or ""
            if published.replace(".", "", 1).isdigit():
                axes.plot(float(published), place, "o", color=colour, ms=7)
        if "decode" in row:
            decode, filled = row["decode"]["tinychat"], row["label"] == "measured"
            axes.plot(decode["tokens_per_s"], place, "D", color=HERE, ms=8,
                      mfc=HERE if filled else "none")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), _titles(rows))
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_xlabel("decode tokens/s, batch 1, 4 tokens cached")
    for label, style in (
        ("here, measured", {"marker": "D", "color": HERE}),
        ("here, predicted", {"marker": "D", "color": HERE, "mfc": "none"}),
        *((f"{title}", {"marker": "o", "color": COLOURS[key]}) for key, title in DEVICES.items()),
    ):
        axes.plot([], [], linestyle="none", label=label, **style)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), title="filled: published\nhollow: roofline"
    )


def _plot_first_token(axes: Any, rows: list[Row]) -> None:
    """Seconds from question to first token, stacked."""
    left = [0.0] * len(rows)
    for part, colour in zip(TTFT_PARTS, ("#999999", "#E69F00", "#0072B2"), strict=True):
        seconds = [row["ttft_ms"][part] / 1e3 for row in rows]
        axes.barh(range(len(rows)), seconds, left=left, label=part, color=colour)
        left = [before + more for before, more in zip(left, seconds, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.2g} s", va="center")
    axes.set_yticks(range(len(rows)), _titles(rows))
    axes.set_ylim(max(len(rows), 3) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds to the first token of an answer about one image, measured here")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def _plot_contexts(axes: Any, rows: list[Row]) -> None:
    """Decode tokens/s against the cached tokens; measured solid, predicted dashed."""
    for row, title in zip(rows, _titles(rows), strict=True):
        points = sorted((point["context"], point["tokens_per_s"]) for point in row["contexts"])
        measured = row["label"] == "measured"
        axes.plot(*zip(*points, strict=True), "o-" if measured else "o--",
                  label=title if measured else f"{title}, predicted")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("decode tokens/s here")
    axes.grid(which="both", alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
