"""One step of a table's row in a process of its own: `python -m … build|measure ARGUMENTS`."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.bench.fill_table import TimeLimit, TimeUp
from vila_deploy.cli.common import command_errors
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.module_command import module_command

if TYPE_CHECKING:
    from vila_deploy.bench.measure_row import MeasureSettings

MODULE = "vila_deploy.cli.bench_table_worker"
PR_SET_PDEATHSIG = 1
# Until a process that was told to end is killed.
GRACE_S = 10.0
TICK_S = 1.0


class SubprocessWorker:
    """Implements `vila_deploy.bench.fill_table.Worker` for one target."""

    def __init__(self, target: str):
        self._target = target

    def build(
        self, model: str, precision: str, max_seq_len: int, out: Path, limit: TimeLimit
    ) -> None:
        """Build an engine with random weights into the new folder `out`."""
        arguments = [model, precision, self._target, str(max_seq_len), str(out)]
        run_step(["build", *arguments], limit)

    def measure(self, engine: Path, settings: MeasureSettings, limit: TimeLimit) -> dict[str, Any]:
        """Return the figures of `measure_row`."""
        printed = run_step(["measure", str(engine), json.dumps(settings.to_json())], limit)
        row: dict[str, Any] = json.loads(printed)
        return row


def run_step(arguments: Sequence[str], limit: TimeLimit) -> str:
    """Run this module in a new process and return what it prints.

    Raises:
        VilaDeployError: the process failed, with its own line, or died.
        TimeUp: it had not ended at the limit, and was ended.
    """
    process = subprocess.Popen(
        module_command(MODULE, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, messages = _wait(process, limit)
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        raise VilaDeployError(_problem(process.returncode, messages))
    return printed


def _wait(process: subprocess.Popen[str], limit: TimeLimit) -> tuple[str, str]:
    """Return the output of `process`; raise TimeUp if it has not ended at the limit."""
    deadline = time.monotonic() + limit.seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return process.communicate(timeout=max(0.0, min(TICK_S, left)))
        except subprocess.TimeoutExpired:
            if left <= TICK_S:
                raise TimeUp from None
            limit.tick()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _problem(code: int, messages: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        more = "; Linux ends programs so when memory runs out" if name == "SIGKILL" else ""
        return f"the process died of {name}{more}"
    lines = [line for line in messages.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"the process ended with code {code}"


@command_errors
def main() -> None:
    """Do the step that the command line names; a measurement is printed as JSON."""
    _end_with_parent()
    step, *arguments = sys.argv[1:]
    if step == "build":
        from vila_deploy.builder.build import build_random_engine

        model, precision, target, length, out = arguments
        build_random_engine(model, precision, target, Path(out), max_seq_len=int(length))
    else:
        from vila_deploy.bench.measure_row import MeasureSettings, measure_row

        engine, settings = arguments
        row = measure_row(Path(engine), MeasureSettings.from_json(json.loads(settings)))
        print(json.dumps(row))


def _end_with_parent() -> None:
    """Let Linux end this process when vila-bench is killed, so that no work goes on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
