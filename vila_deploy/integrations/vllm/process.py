"""Start vLLM, wait until it answers, and end it with us."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from vila_deploy.integrations.vllm.command import Command
from vila_deploy.utils.errors import VilaDeployError

POLL_S = 0.5
HEALTH_TIMEOUT_S = 5.0
# For vLLM to end its own processes after SIGTERM; killed after that.
END_S = 30.0
SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


class VllmProcess:
    """A running vLLM; it writes to our stderr."""

    def __init__(self, command: Command, secrets: Mapping[str, str]):
        self._ended_by_us = False
        # A session of its own, so that Ctrl-C reaches it through us, after running answers.
        self._popen = subprocess.Popen(
            command.words,
            env={**os.environ, **command.environment, **secrets},
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def wait(self) -> int:
        """Return its exit code, when it has ended by itself."""
        return self._popen.wait()

    def wait_until_ready(self, url: str) -> None:
        """Return when it answers at `url`.

        Raises:
            VilaDeployError: it ended instead.
        """
        while not _answers(f"{url}/health"):
            self.check_running()
            time.sleep(POLL_S)

    def check_running(self) -> None:
        """Raise VilaDeployError if it has ended."""
        code = self._popen.poll()
        if code is not None:
            raise VilaDeployError(
                f"vLLM ended with exit code {code}", fix="its own lines above say why"
            )

    def on_end(self, act: Callable[[], None]) -> None:
        """Call `act` in a thread once it ends without `end`."""

        def watch() -> None:
            self._popen.wait()
            if not self._ended_by_us:
                act()

        threading.Thread(target=watch, daemon=True).start()

    def end(self) -> None:
        """End it and its processes."""
        self._ended_by_us = True
        if self._popen.poll() is None:
            self._popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(END_S)
        # Workers that are left hold the GPU's memory.
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)


@contextmanager
def running(command: Command, secrets: Mapping[str, str] | None = None) -> Iterator[VllmProcess]:
    """Run vLLM until the block ends.

    Args:
        secrets: further variables, which are shown to nobody.
    """
    process = VllmProcess(command, secrets or {})
    try:
        yield process
    finally:
        process.end()


def _end_with_parent() -> None:
    """Have Linux end this process when its parent has been killed: it would keep the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
