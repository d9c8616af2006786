"""What an earlier call's rows say was wrong, once more, under compute-sanitizer where it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

from benchmarks.gpu.checks import CASES, NAMED
from benchmarks.gpu.environment import REPOSITORY, Run
from benchmarks.gpu.steps import measure_launch_modes

LEAST_S = 5.0


def measure_again(run: Run) -> None:
    """Repeat each check that disagreed; if none did, time the launch modes with changed tiles."""
    last = {row["name"]: row.get("agrees") for row in run.rows if row["kind"] == "check"}
    wrong = [n for n, agrees in last.items() if agrees is False and n.split()[0] in CASES]
    if not wrong:
        measure_launch_modes(run)
    for name in wrong:
        if run.left_s < LEAST_S:
            run.add("skipped", name, reason="no time left")
            continue
        _sanitize(run, name)


def _sanitize(run: Run, name: str) -> None:
    command = [
        sys.executable, "-m", "benchmarks.gpu.stage", "recheck", "--out", str(run.out),
        *(["--small"] if run.small else []),
    ]  # fmt: skip
    tool = shutil.which("compute-sanitizer")
    if tool is not None:
        command = [tool, "--tool", "memcheck", *command]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=run.left_s,
            input=f"{time.monotonic() + run.left_s}\n", env={**os.environ, NAMED: name},
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        run.add("failed", f"{name} again", reason="no time left")
        return
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    print(done.stdout, done.stderr, sep="\n", flush=True)
    run.add(
        "sanitized", name, tool=tool, exit_code=done.returncode, said=said[:20],
    )  # fmt: skip
