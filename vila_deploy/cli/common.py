"""How every command is declared, ends on a problem, and prints for people and programs."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click

from vila_deploy.utils.errors import OUT_OF_MEMORY, VilaDeployError, out_of_memory, printable
from vila_deploy.utils.version import __version__

if TYPE_CHECKING:
    from vila_deploy.builder.fit import Fit
    from vila_deploy.checkpoint.hub import Download
    from vila_deploy.utils.estimates import MemoryItem, PlanStep

P = ParamSpec("P")
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


class FilePath(click.Path):
    """A path that isn't empty, as that of an unset variable is: pathlib reads it as this folder."""

    def __init__(self, path_type: type = Path, **options: Any):
        super().__init__(path_type=path_type, **options)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        if value == "":
            self.fail("is empty; give a path, which is . for this folder", param, ctx)
        return super().convert(value, param, ctx)


def command(name: str) -> Callable[[Callable[P, None]], click.Command]:
    """Declare a function as the command `name`, with -h, --version and `command_errors`."""

    def declare(function: Callable[P, None]) -> click.Command:
        settings = {"help_option_names": ["-h", "--help"]}
        declared = click.command(name, context_settings=settings)(command_errors(function))
        return click.version_option(__version__, message="%(prog)s %(version)s")(declared)

    return declare


def command_errors(command: Callable[P, None]) -> Callable[P, None]:
    """End a command with one line on stderr instead of a traceback; SIGTERM counts as Ctrl-C."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A character that the output's encoding lacks is escaped, as on stderr.
            sys.stdout.reconfigure(errors="backslashreplace")
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            command(*args, **kwargs)
        except VilaDeployError as error:
            fail(str(error))
        except BrokenPipeError:
            # The reader of our output has gone.
            _discard_stdout()
            sys.exit(EXIT_FAILED)
        except KeyboardInterrupt as interrupt:
            click.echo(f"interrupted: {str(interrupt) or 'nothing was left behind'}", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "vila_deploy"):
                raise
            fail(
                f"the Python package {package} is missing in {sys.prefix}; "
                "install vila-deploy into this environment again"
            )
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            fail(OUT_OF_MEMORY)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            try:
                sys.stdout.flush()
            except OSError:
                _discard_stdout()
            fail(f"{where}{error.strerror or error}; check the path, its permissions and the disk")
        finally:
            # A program that calls a command keeps its own handler.
            signal.signal(signal.SIGTERM, previous)

    return run


def _discard_stdout() -> None:
    """Keep Python from complaining again, while it closes stdout, of what can't be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def no_nan(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """Refuse NaN, which click finds in every range."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("must be a number")
    return value


def named_target(context: click.Context, option: click.Parameter, value: str) -> str:
    """Return the target of --target, and say which one this computer is for "auto"."""
    from vila_deploy.engine.local_target import target_name

    # Click calls this outside the command, where errors become one line.
    try:
        name, note = target_name(value)
    except VilaDeployError as error:
        fail(str(error))
    if note:
        click.echo(note, err=True)
    return name


def note_unused(root: Path, prompt_template: str | None) -> None:
    """Say so where a checkpoint has a chat template, or weights, other than those that are used."""
    from vila_deploy.checkpoint.config import config_of
    from vila_deploy.checkpoint.folder_layout import find_layout
    from vila_deploy.checkpoint.tinychat_file import unread_note
    from vila_deploy.processing.own_template import template_note

    layout = find_layout(root)
    config = config_of(layout, prompt_template)
    for note in (template_note(layout.folder("llm"), config), unread_note(layout)):
        if note:
            click.echo(note, err=True)


def show_download(download: Download | None) -> None:
    """Print what is to be fetched of a checkpoint on the hub; None is one on this computer."""
    if download is not None:
        click.echo(download.summary())


def download_json(download: Download | None) -> dict[str, Any]:
    """Return a plan's key about the hub; none for a checkpoint on this computer."""
    return {} if download is None else {"download": download.to_json()}


def fail(message: str) -> NoReturn:
    """Print `message` as one line and end with exit code 1."""
    click.echo(f"error: {printable(message)}", err=True)
    sys.exit(EXIT_FAILED)


def echo_json(value: Any) -> None:
    """Print `value` as one JSON document; ASCII if the output's encoding lacks a character."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    click.echo(text)


def show_plan(items: Iterable[MemoryItem], steps: Iterable[PlanStep]) -> None:
    """Print a plan's memory items as a table, and memory and time of each of its steps."""
    from rich.console import Console
    from rich.table import Table

    from vila_deploy.utils.progress import clock

    table = Table("part", "parameters", "bits", "MB", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for item in items:
        table.add_row(
            item.name, f"{item.parameters:,}", f"{item.bits:.3g}", f"{item.bytes / 1e6:,.1f}"
        )
    console = Console()
    console.print(table)
    for step in steps:
        time = "" if step.seconds is None else f", {clock(step.seconds)}"
        console.print(f"{step.name}: about {step.memory_bytes / 1e9:.1f} GB of memory{time}")


def show_fits(fits: Iterable[Fit]) -> None:
    """Print on which targets a model fits, and what to change where it doesn't."""
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
