"""Run vila-serve's server, and say where it answers once it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import socket

    from vila_deploy.server.app import ServedApi


def run_announced(
    api: ServedApi, listener: socket.socket, tls: tuple[Path, Path] | None, how: str
) -> None:
    """Do what `run_server` does; print the address and `how` once requests are answered."""
    from vila_deploy.server.run_server import run_server, url

    address, name = url(listener, tls is not None), api.options.model_names[0]
    started = f"{name} answers at {address} (API: {address}/v1), {how}"
    run_server(api, listener, tls, lambda: click.echo(started))
