"""Run a command in a pseudo-terminal, type into it and wait for what it shows."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

CTRL_C, CTRL_D, UP, TAB, ENTER = "\x03", "\x04", "\x1b[A", "\t", "\r"
PASTE = "\x1b[200~{}\x1b[201~"  # as terminals send pasted text, with \r for a new line
PROMPT = "> "
TIMEOUT_S = 150


class Terminal:
    """A command whose stdin, stdout and stderr are one terminal; `shown` is all that it printed."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int):
        self._process, self._descriptor = process, descriptor
        self.shown, self._seen = "", 0

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode("utf-8", "surrogateescape"))

    def enter(self, line: str) -> None:
        self.type(line + ENTER)

    def wait_for(self, text: str, timeout_s: float = TIMEOUT_S) -> str:
        """Return what was shown since the last call, up to and with `text`."""
        end = time.monotonic() + timeout_s
        while (found := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self._seen :]!r}"
            assert self._read(1.0), f"ended without {text!r}: {self.shown[self._seen :]!r}"
        start, self._seen = self._seen, found + len(text)
        return self.shown[start : self._seen]

    def press(self, keys: str, text: str) -> None:
        """Press `keys` and wait for `text`; again after a while, as a person would.

        Without readline, Python sees a signal that comes just before it waits for a line only with
        the next key.
        """
        end = time.monotonic() + TIMEOUT_S
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self._seen :]!r}"
            self.type(keys)
            until = time.monotonic() + 3
            while text not in self.shown[self._seen :] and time.monotonic() < until:
                assert self._read(0.2), f"ended without {text!r}: {self.shown[self._seen :]!r}"
        self.wait_for(text)

    def ends(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for the end of the command; its exit code."""
        end = time.monotonic() + timeout_s
        while self._read(1.0):
            assert time.monotonic() < end, f"still runs: {self.shown[self._seen :]!r}"
        return self._process.wait(timeout_s)

    def wait_for_sleep(self) -> None:
        """Wait until the command waits for something itself, and is not only kept waiting by load.

        Linux calls a process that could run, but has no processor, running.
        """
        end, before, same = time.monotonic() + TIMEOUT_S, "", 0
        while same < 10:
            assert time.monotonic() < end, "it does not wait for a key"
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            now = "".join(line for line in lines if line.startswith(("State", "voluntary")))
            same = same + 1 if now == before and "S (sleeping)" in now else 0
            before = now
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def _read(self, timeout_s: float) -> bool:
        """Add what is shown within a while; False if the command has ended."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return True
        # Linux has EIO where others have an end of file.
        with suppress(OSError):
            content = os.read(self._descriptor, 65536)
            self.shown += content.decode("utf-8", "replace")
            return bool(content)
        return False


@contextmanager
def terminal(
    *words: object, home: Path, stdout: Path | None = None, **more: str
) -> Iterator[Terminal]:
    """Run a command in a terminal of its own, with `home` for its history.

    Args:
        stdout: a file that takes the place of the terminal there.
    """
    ours, theirs = pty.openpty()
    environment: Mapping[str, str] = {
        **os.environ, "OMP_NUM_THREADS": "1", "HOME": str(home), "TERM": "xterm",
        "INPUTRC": "/dev/null", **more,
    }  # fmt: skip
    output = theirs if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT)
    process = subprocess.Popen(
        list(map(str, words)), stdin=theirs, stdout=output, stderr=theirs, env=environment,
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    """Make stdin the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
