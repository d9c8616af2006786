"""Measure an engine in a process of its own: `python -m vila_deploy.cli.bench_worker ENGINE`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from vila_deploy.cli.common import EXIT_FAILED, command_errors
from vila_deploy.utils.module_command import module_command


def measure_in_subprocess(engine: Path) -> dict[str, Any]:
    """Return the row of `vila_deploy.bench.measure`, taken in a new process.

    Its stderr is this process's. Ends with exit code 1 if the worker fails.
    """
    worker = subprocess.Popen(
        module_command("vila_deploy.cli.bench_worker", str(engine)),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        printed, _ = worker.communicate()
    except KeyboardInterrupt:
        worker.terminate()
        worker.wait()
        raise
    if worker.returncode:
        sys.exit(EXIT_FAILED)
    row: dict[str, Any] = json.loads(printed)
    return row


@command_errors
def main() -> None:
    """Print the row of the engine named on the command line as JSON."""
    from vila_deploy.bench.measure import measure

    print(json.dumps(measure(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
