"""vila-bench: tokens per second, time to first token and memory of engines."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli.common import command_errors
from vila_deploy.utils.module_command import command

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("engines", type=click.Path(path_type=Path), nargs=-1)
@click.option("--model", help="A released model's shapes, e.g. VILA1.5-3b; with --random-weights.")
@click.option(
    "--precision", "precisions", type=click.Choice(["int4", "fp16"]), multiple=True,
    help="For --model; repeatable, default int4.",
)  # fmt: skip
@click.option("--target", default="cpu", show_default=True, help="For --model.")
@click.option("--random-weights", is_flag=True, help="Build --model with random weights first.")
@click.option(
    "-o", "output", type=click.Choice(["md", "csv", "json"]), default="md", show_default=True
)
@command_errors
def main(
    engines: tuple[Path, ...],
    model: str | None,
    precisions: tuple[str, ...],
    target: str,
    random_weights: bool,
    output: str,
) -> None:
    """Measure ENGINES, folders made by vila-build-engine, one after the other.

    Decoding is 256 greedy tokens at batch 1 after one picture. Each engine runs in a process of
    its own; the share of bandwidth is taken of this host's reading speed measured in that process,
    on a GPU of the bandwidth published for the engine's target.

    \b
    vila-bench my-engine-int4 my-engine-fp16
    vila-bench --model VILA1.5-3b --precision int4 --target cpu --random-weights -o json
    """
    if bool(engines) == bool(model):
        raise click.UsageError("give either engine folders or --model")
    if model and not random_weights:
        raise click.UsageError("--model has no trained weights at hand: add --random-weights")
    if engines and (precisions or random_weights):
        raise click.UsageError("--precision and --random-weights go with --model")

    from vila_deploy.bench.table import render_rows

    if model is None:
        rows = [_measure(engine) for engine in engines]
    else:
        rows = _measure_random(model, precisions or ("int4",), target)
    click.echo(render_rows(rows, output))


def _measure_random(model: str, precisions: Sequence[str], target: str) -> list[dict[str, Any]]:
    from vila_deploy.bench import gpu
    from vila_deploy.builder.build import build_random_engine
    from vila_deploy.engine.target import get_target

    found, rows = get_target(target), []
    # Before minutes of building: an engine runs only where its GPU is. Building says it of Jetson.
    if not (found.tensorrt and found.tensorrt.jetpacks):
        gpu.gpu_name(found, found.default_backend)
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="vila-bench-") as scratch:
            engine = Path(scratch) / "engine"
            build_random_engine(model, precision, target, engine)
            rows.append(_measure(engine))
    return rows


def _measure(engine: Path) -> dict[str, Any]:
    """Runs the worker; what it says on stderr goes to the user as it is."""
    worker = subprocess.Popen(
        command("vila_deploy.cli.bench_worker", str(engine)), stdout=subprocess.PIPE, text=True
    )
    try:
        printed, _ = worker.communicate()
    except KeyboardInterrupt:
        worker.terminate()
        worker.wait()
        raise
    if worker.returncode:
        sys.exit(1)
    return json.loads(printed)
