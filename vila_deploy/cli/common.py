"""What every command shares: how problems end it, and how results go to programs."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click

from vila_deploy.utils.errors import OUT_OF_MEMORY, VilaDeployError, out_of_memory, printable

if TYPE_CHECKING:
    from vila_deploy.builder.fit import Fit
    from vila_deploy.utils.estimates import MemoryItem, PlanStep

P = ParamSpec("P")
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def command_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Ends a command with one line on stderr instead of a traceback; SIGTERM counts as Ctrl-C."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            command(*args, **kwargs)
        except VilaDeployError as error:
            fail(str(error))
        except BrokenPipeError:
            # The reader of our output has gone; Python would complain again while closing stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_FAILED)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was left behind", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail(OUT_OF_MEMORY)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}; check the path, its permissions and the disk")
        finally:
            # A program that calls a command keeps its own way of ending.
            signal.signal(signal.SIGTERM, previous)

    return run


def no_nan(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Refuses NaN, which lies in every range as click sees it."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("must be a number")
    return value


def fail(message: str) -> NoReturn:
    """Prints `message` as one line and ends with exit code 1."""
    click.echo(f"error: {printable(message)}", err=True)
    sys.exit(EXIT_FAILED)


def echo_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_plan(components: Iterable[MemoryItem], stages: Iterable[PlanStep]) -> None:
    """Prints a plan's parts as a table and the memory of each of its stages."""
    from rich.console import Console
    from rich.table import Table

    from vila_deploy.utils.progress import clock

    table = Table("part", "parameters", "bits", "MB", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for part in components:
        table.add_row(
            part.name, f"{part.parameters:,}", f"{part.bits:.3g}", f"{part.bytes / 1e6:,.1f}"
        )
    console = Console()
    console.print(table)
    for stage in stages:
        time = "" if stage.seconds is None else f", {clock(stage.seconds)}"
        console.print(f"{stage.name}: about {stage.memory_bytes / 1e9:.1f} GB of memory{time}")


def show_fits(fits: Iterable[Fit]) -> None:
    """Prints on which targets a model fits, and what to change where it doesn't."""
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "backend", "needs GB", "has GB", "", box=None)
    for fit in fits:
        verdict = "fits" if fit.fits else f"does not fit; {fit.advice}"
        row = (f"{fit.device_bytes / 1e9:.1f}", f"{fit.limit_bytes / 1e9:.1f}", verdict)
        table.add_row(f"{fit.target} ({fit.title})", fit.backend, *row)
    Console(soft_wrap=True).print(table)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
