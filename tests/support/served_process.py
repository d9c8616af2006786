"""vila-serve as a process of its own, as a person or a supervisor runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.commands import BIN


class Process:
    """A running vila-serve; `url` is where it answers."""

    def __init__(self, folder: Path, *options: object, **environment: str):
        words = [BIN / "vila-serve", folder, "--port", "0", *options]
        self.popen = subprocess.Popen(
            [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        assert self.popen.stdout is not None
        self.started = self.popen.stdout.readline()
        found = re.search(r"answers at (\S+)", self.started)
        assert found, self.popen.communicate()[1]
        self.url = found[1]

    def stop(self, *signals: int) -> int:
        """Send signals, SIGTERM if none is named, and return the exit code."""
        for number in signals or (signal.SIGTERM,):
            self.popen.send_signal(number)
        return self.popen.wait(60)

    @property
    def stderr(self) -> str:
        assert self.popen.stderr is not None
        return self.popen.stderr.read()


@contextmanager
def process(folder: Path, *options: object, **environment: str) -> Iterator[Process]:
    """Run vila-serve until the block ends."""
    running = Process(folder, *options, **environment)
    try:
        yield running
    finally:
        running.popen.kill()
        running.popen.communicate()


@contextmanager
def vila_serve(folder: Path, *options: object) -> Iterator[str]:
    """Yield the address of a server; it must end with exit code 0 when it is told to."""
    with process(folder, *options) as running:
        yield running.url
        assert running.stop() == 0


class Streams:
    """Requests that are streamed at the same time, each by a thread.

    `texts` are what came; `broken` says how many connections ended without an end of their stream.
    """

    def __init__(self, url: str, bodies: list[dict[str, Any]]):
        self.texts = [""] * len(bodies)
        self.statuses = [0] * len(bodies)
        self.broken = 0
        self._url = url
        self._threads = [
            threading.Thread(target=self._read, args=(number, body))
            for number, body in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, number: int, body: dict[str, Any]) -> None:
        path = f"{self._url}/v1/chat/completions"
        body = {**body, "stream": True}
        try:
            with httpx.stream("POST", path, json=body, timeout=60) as response:
                self.statuses[number] = response.status_code
                for text in response.iter_text():
                    self.texts[number] += text
        except httpx.TransportError:
            self.broken += 1

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
