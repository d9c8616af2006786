"""A stage's process: begun early, let go when it is its turn, ended when it must be."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
KILL_AFTER_S = 5.0
POLL_S = 0.05


class StageProcess:
    """A command that prepares itself, and then waits for a line before it begins its work.

    Args:
        log: what it prints is appended to this file.
    """

    def __init__(self, command: Sequence[str], log: Path):
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        self._began = time.monotonic()

    def release(self) -> None:
        """Let it begin its work; its time counts from here."""
        self._began = time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def wait(self, timeout_s: float, meanwhile: Callable[[float], None] | None = None) -> int:
        """Return its exit code; negative for a signal, 124 if it had to be ended.

        Args:
            timeout_s: counted from `release`.
            meanwhile: called again and again with the seconds since then.
        """
        while (code := self._process.poll()) is None and self.seconds < timeout_s:
            if meanwhile is not None:
                meanwhile(self.seconds)
            time.sleep(POLL_S)
        if code is not None:
            self.kill()  # what it left behind
            return code
        self.kill()
        return 124

    def kill(self) -> None:
        """End it and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(KILL_AFTER_S)
            except subprocess.TimeoutExpired:
                continue
            if number == signal.SIGTERM:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            return
