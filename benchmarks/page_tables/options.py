"""The options of each command, out of its --help."""

from __future__ import annotations

from importlib import import_module

import click

from benchmarks.page_tables.sources import markdown

COMMANDS = ("quantize", "build-engine", "chat", "bench", "convert", "serve", "eval")


def options(name: str) -> str:
    """Return the visible options of `vila-NAME`: spelling, default, what --help says."""
    command: click.Command = import_module(f"vila_deploy.cli.{name.replace('-', '_')}").main
    context = click.Context(command)
    rows = []
    for parameter in command.params:
        if not isinstance(parameter, click.Option) or parameter.hidden:
            continue
        default = parameter.get_default(context)
        shown = parameter.show_default and default is not None
        rows.append(
            [_spelling(parameter, context), str(default) if shown else "", _text(parameter)]
        )
    return markdown(["option", "default", "meaning"], rows)


def _spelling(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len))
    if option.is_flag:
        return names
    values = option.type.choices if isinstance(option.type, click.Choice) else ()
    words = " ".join(f"`{value}`" for value in values) or f"`{option.make_metavar(context)}`"
    return f"{names} {words}"


def _text(option: click.Option) -> str:
    return " ".join((option.help or "").split()).replace("|", "\\|")
