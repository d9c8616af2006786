"""An internet of a few names and addresses, for code that fetches from it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from vila_deploy.server.remote_images import Network

PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


class Internet:
    """Names with addresses, and answers by address; remembers each connection and request."""

    timeout_s = 60.0

    def __init__(self, names: dict[str, list[list[str]]], answers: dict[str, Answer]):
        self.names, self.answers = names, answers
        self.connections: list[tuple[str, int]] = []
        self.requests: list[bytes] = []
        self.resolved: list[str] = []

    def resolve(self, host: str, port: int) -> list[str]:
        """Return the next addresses of a name: they may differ each time."""
        self.resolved.append(host)
        found = self.names.get(host)
        if not found:
            raise OSError("no such name")
        return found.pop(0) if len(found) > 1 else found[0]

    async def connect(self, address: str, port: int, **tls: Any) -> Any:
        self.connections.append((address, port))
        answer = self.answers.get(address)
        if answer is None:
            raise ConnectionRefusedError

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(writer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        return await asyncio.open_connection(*server.sockets[0].getsockname())

    @property
    def network(self) -> Network:
        return Network(self.resolve, self.connect, timeout_s=self.timeout_s)
