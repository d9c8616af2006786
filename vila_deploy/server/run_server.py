"""Listen, answer until a signal comes, let running answers end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from vila_deploy.server.app import ServedApi, create_app
from vila_deploy.server.protocol import LimitedProtocol
from vila_deploy.server.security import is_loopback
from vila_deploy.utils.errors import VilaDeployError

BACKLOG = 2048
KEEP_ALIVE_S = 30
# Behind the drain, for what clients are told to reach them.
LAST_WORDS_S = 5


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to a host and port, 0 for any free one, but not listening yet.

    Raises:
        VilaDeployError: no such address here, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of localhost's addresses the one that clients try which know no IPv6.
        family, kind, protocol, _, address = min(found, key=lambda item: item[0])
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no valid address"
        raise VilaDeployError(
            f"can't listen there ({reason})",
            where=f"{host}:{port}",
            fix="give another --host or --port",
        ) from error
    return listener


def is_private(listener: socket.socket) -> bool:
    """Return whether a bound socket can be reached from this computer alone."""
    return is_loopback(listener.getsockname()[0])


def url(listener: socket.socket, secure: bool) -> str:
    """Return the address of a bound socket for a browser."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if secure else 'http'}://{shown}:{port}"


def check_tls(certificate: Path, key: Path) -> None:
    """Raise VilaDeployError unless a certificate and its key can be used."""
    for path in (certificate, key):
        if not path.is_file():
            raise VilaDeployError("no such file", where=path, fix="give a PEM file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_none)
    except (OSError, ValueError) as error:
        raise VilaDeployError(
            "is no certificate with its key",
            where=certificate,
            fix="give PEM files of a certificate chain and of its key, without a password",
        ) from error


def _none() -> str:
    """Return the password of a key: asking for one would wait at the terminal."""
    return ""


def run_server(
    api: ServedApi,
    listener: socket.socket,
    tls: tuple[Path, Path] | None = None,
    on_start: Callable[[], None] | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT; a second one ends the process at once.

    Requests that run then may go on for `drain_timeout_s`; those that can't end are told.

    Args:
        tls: files of a certificate and its key.
        on_start: called when requests are answered.
    """
    try:
        Server(api, tls, on_start).run([listener])
    finally:
        api.close()


def _config(api: ServedApi, tls: tuple[Path, Path] | None) -> uvicorn.Config:
    certificate, key = tls or (None, None)
    return uvicorn.Config(
        create_app(api),
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(api.options.drain_timeout_s) + LAST_WORDS_S,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


class Server(uvicorn.Server):
    """uvicorn's server with a drain: it ends when the answers have, or have been told."""

    def __init__(
        self,
        api: ServedApi,
        tls: tuple[Path, Path] | None = None,
        on_start: Callable[[], None] | None = None,
    ):
        super().__init__(_config(api, tls))
        self._api, self._on_start = api, on_start

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again behind the drain, as uvicorn does."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.stop()

    def stop(self) -> None:
        """Take no more requests, and end when the running ones have; from any thread."""
        self._api.draining = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_start is not None:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        running = len(self.server_state.tasks)
        if running:
            print(f"waiting for {running} requests to end", file=sys.stderr, flush=True)
        drain = asyncio.create_task(self._api.drain())
        await super().shutdown(sockets)
        await drain


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
