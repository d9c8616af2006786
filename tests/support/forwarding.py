"""A server that forwards to another one, inside the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from openai import OpenAI

from tests.support.serving import KEY, NAME
from vila_deploy.server.forwarding import ForwardingApi
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.run_server import Server, bind, url


@dataclass
class Front:
    """A server that answers at `url`."""

    url: str
    server: Server

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)


@contextmanager
def forwarding(
    upstream: str, options: ServerOptions | None = None, upstream_key: str | None = None
) -> Iterator[Front]:
    """Serve in front of `upstream` until the block ends."""
    api = ForwardingApi(upstream, options or ServerOptions((NAME,)), 2048, upstream_key)
    listener, started = bind("127.0.0.1", 0), threading.Event()
    server = Server(api, on_start=started.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield Front(url(listener, secure=False), server)
    finally:
        server.stop()
        thread.join(60)
