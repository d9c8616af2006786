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
        self._ended: float | None = None
        self._code: int | None = None
        self.peak_memory_bytes: int | None = None

    def release(self, limit_s: float) -> None:
        """Let it begin its work, which may take so long; its time counts from here.

        The line says the end of that time by the clock that all processes share, so that what is
        left of its imports counts.
        """
        self._began = time.monotonic()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{self._began + limit_s}\n".encode())
            self._process.stdin.close()

    @property
    def seconds(self) -> float:
        """Seconds since `release`, or until `poll` found it ended."""
        return (time.monotonic() if self._ended is None else self._ended) - self._began

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        if self._code is not None:
            return self._code
        try:
            found, status, used = os.wait4(self._process.pid, os.WNOHANG)
        except ChildProcessError:  # its end was found while a signal came in between
            self._code = -signal.SIGKILL
        else:
            if found:
                self._ended = time.monotonic()
                self._code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_memory_bytes = used.ru_maxrss << 10  # of it and what it waited for
        return self._code

    def wait(self, timeout_s: float, meanwhile: Callable[[float], None] | None = None) -> int:
        """Return its exit code; negative for a signal, 124 if it had to be ended.

        Args:
            timeout_s: counted from `release`.
            meanwhile: called again and again with the seconds since then.
        """
        while (code := self.poll()) is None and self.seconds < timeout_s:
            if meanwhile is not None:
                meanwhile(self.seconds)
            time.sleep(POLL_S)
        self.kill()  # also what it left behind
        return 124 if code is None else code

    def kill(self) -> None:
        """End it and all that it started."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + KILL_AFTER_S
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + KILL_AFTER_S
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
