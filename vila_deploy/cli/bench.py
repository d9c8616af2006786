"""vila-bench: tokens per second, time to first token and memory of engines."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli import bench_worker
from vila_deploy.cli.bench_table import RESULTS, TableOptions, run_table
from vila_deploy.cli.common import FilePath, command, no_nan
from vila_deploy.engine.precision import LLM_PRECISIONS
from vila_deploy.utils.errors import printable
from vila_deploy.utils.files import check_new, write_file

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLE_FORMATS = ("md", "csv", "json")
MAX_CONTEXT = 1 << 20


def _numbers(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Return the numbers of tokens in `0,256,…`, sorted, each once."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(re.fullmatch("[0-9]{1,7}", part) and int(part) <= MAX_CONTEXT for part in parts):
        raise click.BadParameter("give numbers of tokens with commas between, e.g. 0,256,512")
    return tuple(sorted(set(map(int, parts))))


@command("vila-bench")
@click.argument("engines", type=FilePath(), nargs=-1)
@click.option("--model", help="A released model's shapes, e.g. VILA1.5-3b; with --random-weights.")
@click.option(
    "--precision", "precisions", type=click.Choice(LLM_PRECISIONS), multiple=True,
    help="For --model; repeatable, default int4.",
)  # fmt: skip
@click.option(
    "--target", help="For --model, cpu if left out; for --table, this computer if left out."
)
@click.option("--random-weights", is_flag=True, help="Build --model with random weights first.")
@click.option(
    "--table", is_flag=True,
    help="Fill the authors' table, VILA1.5's five models in fp16 and int4, for this computer.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(0), callback=no_nan,
    help="For --table: time for building and measuring, 15 if left out; other rows are predicted.",
)  # fmt: skip
@click.option(
    "--contexts", metavar="N,N…", callback=_numbers,
    help="For --table: also decode behind so many cached tokens, e.g. 0,256,512,960.",
)  # fmt: skip
@click.option("--all", "every_model", is_flag=True,
    help="For --table: add NVILA's models and those of the first generation.",
)  # fmt: skip
@click.option(
    "--results", type=FilePath(file_okay=False), metavar="DIR",
    help="For --table: folder for rows, tables and plots, vila-bench-results if left out. "
    "The same command goes on with the rows that are missing there.",
)  # fmt: skip
@click.option(
    "--baselines", is_flag=True,
    help="For --table: afterwards time llama.cpp, OpenVINO and PyTorch's int4 operator in turn "
    "with ours, beyond --minutes; in a checkout alone.",
)  # fmt: skip
@click.option("--fresh", is_flag=True, help="For --table: forget the rows in the results folder.")
@click.option(
    "--format", "table_format", type=click.Choice(TABLE_FORMATS),
    help="How the table is written; md if left out, or what the ending of -o says.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as --format json: a list of rows.")
@click.option(
    "-o", "--out", type=FilePath(), metavar="FILE",
    help="File for the table, which must not exist; it is printed if left out.",
)  # fmt: skip
def main(
    engines: tuple[Path, ...],
    model: str | None,
    precisions: tuple[str, ...],
    target: str | None,
    random_weights: bool,
    table: bool,
    minutes: float | None,
    contexts: tuple[int, ...] | None,
    every_model: bool,
    results: Path | None,
    baselines: bool,
    fresh: bool,
    table_format: str | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure ENGINES, folders made by vila-build-engine, one after the other.

    Decoding is 256 greedy tokens at batch 1 after one image. Each engine runs in a process of its
    own. The bandwidth is what this computer reads from memory, measured there; on a GPU the
    published one. With --table each row is built with random weights, measured and deleted, and
    ENGINES take the place of the rows of their shapes (docs/benchmarking.md).

    \b
    vila-bench my-engine-int4 my-engine-fp16
    vila-bench --model VILA1.5-3b --precision int4 --target cpu --random-weights --json
    vila-bench --table
    """
    of_table = (minutes, contexts, results, every_model or None, fresh or None, baselines or None)
    of_model = bool(precisions or random_weights)
    if table:
        _check_table_usage(model, of_model)
    else:
        _check_usage(engines, model, of_model, random_weights, of_table)
    if as_json and table_format not in (None, "json"):
        raise click.UsageError(f"--json and --format {table_format} contradict each other")
    table_format = "json" if as_json else table_format
    if table_format is None and str(out) in TABLE_FORMATS:  # -o named the format in version 0.1.0
        table_format, out = str(out), None
    if out is not None:
        check_new(out, "file")
        ending = out.suffix.removeprefix(".")
        table_format = table_format or (ending if ending in TABLE_FORMATS else None)

    if table:
        options = TableOptions(
            engines, target or "auto", 15.0 if minutes is None else minutes, contexts or (),
            results or RESULTS, fresh, every_model, baselines,
        )  # fmt: skip
        rows = run_table(options)
        text = _rendered(rows, table_format, options.results)
    else:
        rows = _measure(engines, model, precisions or ("int4",), target or "cpu")
        text = _rendered(rows, table_format, None)
    if out is None:
        click.echo(text)
    else:
        _write(out, text)
        click.echo(f"{out}: {len(rows)} rows")


def _write(out: Path, text: str) -> None:
    """Write the table; print it where that fails, since measuring took minutes."""
    try:
        write_file(out, f"{text}\n")
    except OSError:
        click.echo(text)
        raise


def _check_table_usage(model: str | None, of_model: bool) -> None:
    if model or of_model:
        raise click.UsageError("--model, --precision and --random-weights don't go with --table")


def _check_usage(
    engines: Sequence[Path],
    model: str | None,
    of_model: bool,
    random_weights: bool,
    of_table: Sequence[object],
) -> None:
    if any(value is not None for value in of_table):
        raise click.UsageError(
            "--minutes, --contexts, --all, --results, --baselines and --fresh go with --table"
        )
    if bool(engines) == bool(model):
        raise click.UsageError("give either engine folders or --model, or --table")
    if model and not random_weights:
        raise click.UsageError("--model has no trained weights at hand: add --random-weights")
    if engines and of_model:
        raise click.UsageError("--precision and --random-weights go with --model")


def _rendered(
    rows: Sequence[dict[str, Any]], table_format: str | None, results: Path | None
) -> str:
    """Return the rows as --format says; `results` is the folder with a filled table's Markdown."""
    from vila_deploy.bench.table import render_rows

    if results is not None and table_format in (None, "md"):
        files = f"Rows, tables and plots: {printable(str(results))}"
        return f"{(results / 'table.md').read_text('utf-8')}\n{files}"
    return render_rows(rows, table_format or "md")


def _measure(
    engines: Sequence[Path], model: str | None, precisions: Sequence[str], target: str
) -> list[dict[str, Any]]:
    if model is None:
        return [bench_worker.measure_in_subprocess(engine) for engine in engines]
    return _measure_random(model, precisions, target)


def _measure_random(model: str, precisions: Sequence[str], target: str) -> list[dict[str, Any]]:
    from vila_deploy.bench import gpu
    from vila_deploy.bench.random_engine import random_engine_length
    from vila_deploy.builder.build import build_random_engine
    from vila_deploy.engine.target import get_target

    device, rows = get_target(target), []
    # Before minutes of building: an engine runs only where its GPU is. Building says it of Jetson.
    if not (device.tensorrt and device.tensorrt.jetpacks):
        gpu.gpu_name(device, device.default_backend)
    disk = Path(tempfile.gettempdir())
    lengths = {name: random_engine_length(model, name, target, disk) for name in precisions}
    for precision, length in lengths.items():
        with tempfile.TemporaryDirectory(prefix="vila-bench-") as scratch:
            engine = Path(scratch) / "engine"
            build_random_engine(model, precision, target, engine, max_seq_len=length)
            rows.append(bench_worker.measure_in_subprocess(engine))
    return rows
