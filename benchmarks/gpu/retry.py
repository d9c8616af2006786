"""What an earlier call's rows say was wrong, once more, under compute-sanitizer where it is."""

from __future__ import annotations

import shutil
import subprocess
import sys

from benchmarks.gpu.checks import CASES
from benchmarks.gpu.environment import REPOSITORY, Run
from benchmarks.gpu.steps import measure_launch_modes

LEAST_S = 5.0


def measure_again(run: Run) -> None:
    """Repeat each check that disagreed; if none did, time the launch modes with changed tiles."""
    wrong = sorted(
        {
            row["name"]
            for row in run.rows
            if row["kind"] == "check" and row.get("agrees") is False
            and row["name"].split()[0] in CASES
        }
    )  # fmt: skip
    if not wrong:
        measure_launch_modes(run)
    for name in wrong:
        if run.left_s < LEAST_S:
            run.add("skipped", name, reason="no time left")
            continue
        _sanitize(run, *name.split())


def _sanitize(run: Run, stem: str, model: str) -> None:
    code = (
        "import sys; from pathlib import Path; import torch;"
        "from benchmarks.gpu.environment import Run; from benchmarks.gpu.checks import check;"
        "from vila_deploy.kernels.capability import ComputeCapability;"
        "gpu = ComputeCapability(*torch.cuda.get_device_capability());"
        "run = Run('cuda', gpu, 60.0, Path(sys.argv[1]), small=bool(int(sys.argv[4])));"
        "run.stage = 'retry';"
        "sys.exit(not check(run, sys.argv[2], sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(run.out), stem, model, str(int(run.small))]
    tool = shutil.which("compute-sanitizer")
    if tool is not None:
        command = [tool, "--tool", "memcheck", *command]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=run.left_s, check=False
        )
    except subprocess.TimeoutExpired:
        run.add("failed", f"{stem} {model} again", reason="no time left")
        return
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    print(done.stdout, done.stderr, sep="\n", flush=True)
    run.add(
        "sanitized", f"{stem} {model}", tool=tool, exit_code=done.returncode, said=said[:20],
    )  # fmt: skip
