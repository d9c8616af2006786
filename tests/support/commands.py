"""Run the commands as users do."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from click.testing import CliRunner

BIN = Path(sys.executable).parent


def run(command: str, *args: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs an installed command the way a user does."""
    return subprocess.run(
        [BIN / command, *map(str, args)],
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def succeed(command: str, *args: object) -> str:
    """Runs a command that must end with exit code 0; what it printed on stdout."""
    done = invoke(command, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def invoke(command: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs a command inside this process: the same but for a second or more of imports."""
    module = import_module(f"vila_deploy.cli.{command.removeprefix('vila-').replace('-', '_')}")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    done = CliRunner().invoke(module.main, [*map(str, args)])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if not isinstance(done.exception, SystemExit | None):
        raise done.exception
    return subprocess.CompletedProcess(args, done.exit_code, done.stdout, done.stderr)


def assert_one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Exit code 1 and one `error:` line at the end of stderr, without a traceback; that line."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], done.stderr
    return errors[0]
