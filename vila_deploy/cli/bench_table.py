"""vila-bench --table: the authors' table for this computer, with its files and plots."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli.bench_baselines import check_checkout, cpu_rows, run_on_gpu
from vila_deploy.cli.common import EXIT_INTERRUPTED
from vila_deploy.utils.errors import VilaDeployError, printable
from vila_deploy.utils.files import replace_file

if TYPE_CHECKING:
    from vila_deploy.bench.fill_table import Table
    from vila_deploy.bench.results_file import ResultsFile
    from vila_deploy.engine.target import Target

RESULTS = Path("vila-bench-results")
# Engines lie here while they are measured; what a kill leaves is removed at the next start.
WORK = "work"
BASELINES, GPU_BASELINES = "baselines.jsonl", "gpu-baselines.jsonl"


@dataclass(frozen=True)
class TableOptions:
    """The options of `vila-bench --table`."""

    engines: tuple[Path, ...] = ()
    target: str = "auto"
    minutes: float = 15.0
    contexts: tuple[int, ...] = ()
    results: Path = RESULTS
    fresh: bool = False
    every_model: bool = False
    baselines: bool = False


def run_table(options: TableOptions) -> list[dict[str, Any]]:
    """Fill the table, write its files into the results folder and return its rows.

    Raises:
        VilaDeployError: unknown target, an ENGINE that is none, or a results folder in use.
    """
    from vila_deploy.bench.fill_table import expected_seconds, fill_table
    from vila_deploy.bench.results_file import ResultsFile
    from vila_deploy.engine.local_target import target_name
    from vila_deploy.engine.target import get_target
    from vila_deploy.utils.progress import progress

    if options.baselines:
        check_checkout()
    name, note = target_name(options.target)
    target = get_target(name)
    if note:
        click.echo(note, err=True)
    rows = _rows(options, target)
    options.results.mkdir(parents=True, exist_ok=True)
    results = ResultsFile(options.results)
    with results.lock():
        shutil.rmtree(options.results / WORK, ignore_errors=True)
        earlier_bandwidth = _best_bandwidth(options.results)
        if options.fresh:
            results.clear()
        earlier = results.read()
        table = _table(options, target, rows, earlier_bandwidth)
        seconds = expected_seconds(table, earlier)
        with _keep_on_interrupt(options.results):
            with progress(seconds, "seconds of work") as advance:
                filled = fill_table(table, results, advance)
            # Written now, so that the table is there whatever other programs do.
            _write_files(filled, results, [])
            if options.baselines:
                _write_files(filled, results, _baselines(filled, target, options.results))
    return filled


def _baselines(
    filled: Sequence[dict[str, Any]], target: Target, folder: Path
) -> list[dict[str, Any]]:
    """Measure other programs beside ours and return the rows of a CPU's."""
    from vila_deploy.bench.results_file import ResultsFile

    if target.compute_capability is not None:
        click.echo(run_on_gpu(folder / GPU_BASELINES), err=True)
        return []
    rows, file = [], ResultsFile(folder, BASELINES)
    file.clear()
    for row in cpu_rows([row for row in filled if row["label"] == "measured"], folder / WORK):
        file.append(row)
        rows.append(row)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return rows


def _rows(options: TableOptions, target: Target) -> list[Any]:
    from vila_deploy.bench.table_rows import table_rows

    return table_rows(options.every_model, options.engines, target)


def _best_bandwidth(folder: Path) -> float | None:
    """Return what this computer's memory gave beside the rows of a results folder, if known."""
    from vila_deploy.bench.conditions import processor_name, usable_cores
    from vila_deploy.bench.noise import best_bandwidth
    from vila_deploy.bench.results_file import ResultsFile

    here = processor_name(), str(usable_cores())
    try:
        rows = ResultsFile(folder).read()
    except VilaDeployError:
        return None  # Reading the rows says what is wrong, unless --fresh forgets them.
    return best_bandwidth(
        [r for r in rows if (r.get("device"), r.get("state", {}).get("cores")) == here]
    )


def _table(
    options: TableOptions, target: Target, rows: Sequence[Any], earlier_bandwidth: float | None
) -> Table:
    from vila_deploy.bench import gpu
    from vila_deploy.bench.bandwidth import LARGE_BUFFER_BYTES, read_bandwidth_bytes_per_s
    from vila_deploy.bench.conditions import commit, processor_name
    from vila_deploy.bench.estimates import first_rates
    from vila_deploy.bench.fill_table import Table
    from vila_deploy.bench.measure_row import MeasureSettings
    from vila_deploy.bench.table_rows import plan_row
    from vila_deploy.cli.bench_table_worker import SubprocessWorker

    device = gpu.gpu_name(target, target.default_backend) if options.minutes else None
    bandwidth = target.bandwidth_bytes_per_s or read_bandwidth_bytes_per_s(LARGE_BUFFER_BYTES)
    settings, work = MeasureSettings(contexts=options.contexts), options.results / WORK
    return Table(
        rows=rows,
        plans={row: plan_row(row, target) for row in rows if row.has_shapes},
        target=target,
        settings=settings,
        minutes=options.minutes,
        identity={
            "device": device or (target.title if target.compute_capability else processor_name()),
            "target": target.name,
            "settings": settings.to_json(),
            "commit": commit(),
        },
        rates=first_rates(work.parent, bandwidth, target.compute_capability is not None),
        worker=SubprocessWorker(target.name),
        scratch=partial(_scratch, work),
        free_bytes=lambda: shutil.disk_usage(work.parent).free,
        earlier_bandwidth=earlier_bandwidth,
    )


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    work.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            yield Path(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _keep_on_interrupt(results: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        shutil.rmtree(results / WORK, ignore_errors=True)
        click.echo(
            f"interrupted: finished rows are kept in {printable(str(results))}; the same command "
            "goes on",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)


def _write_files(
    rows: Sequence[dict[str, Any]], results: ResultsFile, baselines: Sequence[dict[str, Any]]
) -> None:
    """Write table.md, .csv, .json and the plots, replacing those of an earlier run."""
    from vila_deploy.bench.baselines import render_baselines
    from vila_deploy.bench.plots import write_plots
    from vila_deploy.bench.table import render_rows
    from vila_deploy.bench.table_markdown import render_table

    folder = results.folder
    markdown = "\n".join(filter(None, [render_table(rows), render_baselines(baselines)]))
    texts = {"md": markdown, **{s: render_rows(rows, s) + "\n" for s in ("csv", "json")}}
    temporary = folder / ".table"
    try:
        for ending, text in texts.items():
            temporary.write_text(text, "utf-8")
            replace_file(temporary, folder / f"table.{ending}")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise VilaDeployError(
            f"cannot write the table: {error.strerror}",
            where=folder,
            fix="free some space; finished rows are kept, and the same command goes on",
        ) from error
    try:
        write_plots(rows, folder)
    except VilaDeployError as error:
        click.echo(str(error), err=True)
    except OSError as error:
        click.echo(f"no plots: {error.strerror or error}", err=True)
