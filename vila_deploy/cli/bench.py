"""vila-bench: tokens per second, time to first token and memory of engines."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli import bench_worker
from vila_deploy.cli.common import command
from vila_deploy.engine.precision import LLM_PRECISIONS
from vila_deploy.utils.files import check_new

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLE_FORMATS = ("md", "csv", "json")


@command("vila-bench")
@click.argument("engines", type=click.Path(path_type=Path), nargs=-1)
@click.option("--model", help="A released model's shapes, e.g. VILA1.5-3b; with --random-weights.")
@click.option(
    "--precision", "precisions", type=click.Choice(LLM_PRECISIONS), multiple=True,
    help="For --model; repeatable, default int4.",
)  # fmt: skip
@click.option("--target", default="cpu", show_default=True, help="For --model.")
@click.option("--random-weights", is_flag=True, help="Build --model with random weights first.")
@click.option(
    "--format", "table_format", type=click.Choice(TABLE_FORMATS),
    help="How the table is written; md if left out, or what the ending of -o says.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json: a list of rows.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="FILE",
    help="File for the table, which must not exist; it is printed if left out.",
)  # fmt: skip
def main(
    engines: tuple[Path, ...],
    model: str | None,
    precisions: tuple[str, ...],
    target: str,
    random_weights: bool,
    table_format: str | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure ENGINES, folders made by vila-build-engine, one after the other.

    Decoding is 256 greedy tokens at batch 1 after one image. Each engine runs in a process of its
    own. The bandwidth is what this computer reads from memory, measured in that process; on a GPU
    it is the one published for the engine's target.

    \b
    vila-bench my-engine-int4 my-engine-fp16
    vila-bench --model VILA1.5-3b --precision int4 --target cpu --random-weights --json
    """
    if bool(engines) == bool(model):
        raise click.UsageError("give either engine folders or --model")
    if model and not random_weights:
        raise click.UsageError("--model has no trained weights at hand: add --random-weights")
    if engines and (precisions or random_weights):
        raise click.UsageError("--precision and --random-weights go with --model")
    if as_json and table_format not in (None, "json"):
        raise click.UsageError(f"--json and --format {table_format} contradict each other")
    table_format = "json" if as_json else table_format
    if table_format is None and str(out) in TABLE_FORMATS:  # -o named the format in version 0.1.0
        table_format, out = str(out), None
    if out is not None:
        check_new(out, "file")
        ending = out.suffix.removeprefix(".")
        table_format = table_format or (ending if ending in TABLE_FORMATS else None)

    from vila_deploy.bench.table import render_rows

    if model is None:
        rows = [bench_worker.measure_in_subprocess(engine) for engine in engines]
    else:
        rows = _measure_random(model, precisions or ("int4",), target)
    table = render_rows(rows, table_format or "md")
    if out is None:
        click.echo(table)
    else:
        out.write_text(f"{table}\n", "utf-8")
        click.echo(f"{out}: {len(rows)} rows")


def _measure_random(model: str, precisions: Sequence[str], target: str) -> list[dict[str, Any]]:
    from vila_deploy.bench import gpu
    from vila_deploy.builder.build import build_random_engine
    from vila_deploy.engine.target import get_target

    device, rows = get_target(target), []
    # Before minutes of building: an engine runs only where its GPU is. Building says it of Jetson.
    if not (device.tensorrt and device.tensorrt.jetpacks):
        gpu.gpu_name(device, device.default_backend)
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="vila-bench-") as scratch:
            engine = Path(scratch) / "engine"
            build_random_engine(model, precision, target, engine)
            rows.append(bench_worker.measure_in_subprocess(engine))
    return rows
