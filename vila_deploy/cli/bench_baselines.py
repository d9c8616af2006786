"""vila-bench --table --baselines: run the checkout's benchmarks of other programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vila_deploy.utils.errors import VilaDeployError

CHECKOUT = Path(__file__).resolve().parents[2]
CPU_MODULE, GPU_MODULE = "benchmarks.cpu_baselines", "benchmarks.gpu"
# Shapes that are taken where no row has been measured, and whose engines are the smallest.
MODEL, PRECISIONS = "VILA1.5-3b", ("int4", "fp16")
# For programs to end, and their engines to be removed, after an interruption.
GRACE_S = 10.0


def check_checkout() -> None:
    """Raise VilaDeployError unless the benchmarks of other programs lie beside this package."""
    if not (CHECKOUT / "benchmarks" / "cpu_baselines" / "__main__.py").exists():
        raise VilaDeployError(
            "--baselines needs a checkout of this project: its folder benchmarks/ is not installed",
            fix="clone the repository, install it with pip install -e . and run vila-bench there",
        )


def cpu_rows(measured: Sequence[dict[str, Any]], work: Path) -> Iterator[dict[str, Any]]:
    """Yield rows of other programs and of ours in turn with them, and reasons of those that can't.

    Args:
        measured: rows of the table that were measured: the shapes of the first are taken.
        work: a folder for engines in use.
    """
    model = measured[0]["model"] if measured else MODEL
    precisions = [row["precision"] for row in measured if row["model"] == model] or PRECISIONS[:1]
    command = [sys.executable, "-m", CPU_MODULE, "--model", model, "--work", str(work.resolve())]
    for precision in sorted(precisions, reverse=True):
        command += ["--precision", precision]
    # A group of its own, which the other programs are in: an interruption ends them all.
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield json.loads(line)
    except BaseException:
        _interrupt(process)
        raise
    finally:
        process.stdout.close()
        code = process.wait()
    if code:
        yield {"what": CPU_MODULE, "label": "skipped", "reason": f"ended with code {code}"}


def _interrupt(process: subprocess.Popen[str]) -> None:
    """End the group of `process`, which removes what it has written unless it takes too long."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def run_on_gpu(out: Path) -> str:
    """Run the GPU's benchmark, which appends its rows to `out`; return what to say in the end."""
    command = [sys.executable, "-m", GPU_MODULE, "--out", str(out.resolve())]
    code = subprocess.run(command, cwd=CHECKOUT, check=False).returncode
    if code:
        return f"baselines: {GPU_MODULE} ended with code {code}; the table stands without them"
    return f"baselines: rows in {out}"
