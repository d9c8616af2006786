"""`python -m benchmarks.gpu`: checks, then times; one JSON line a figure, and a plot."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.environment import REPOSITORY, Run, make_importable

# Rows of the table that a run goes through until its time is up, most wanted first.
LIMIT_S, LEAST_S = 560.0, 30.0
# A way of these may hang, and a graph that another stage failed to capture must not stop them.
APART = ("boundaries",)
COMPILE_S = 150.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="rows are appended")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    parser.add_argument("--only", help="stages after the checks, e.g. steps,baselines")
    parser.add_argument("--unchecked", action="store_true", help="time without the checks")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    make_importable()
    only = arguments.only and arguments.only.split(",")
    checked, out = not arguments.unchecked, arguments.out.resolve()
    return benchmark(out, arguments.limit_s, only, rehearse=arguments.rehearse, checked=checked)


def benchmark(
    out: Path, limit_s: float, only: list[str] | None, *, rehearse: bool, checked: bool = True
) -> int:
    """All stages in turn; 1 if a kernel disagrees with its reference, then nothing is timed."""
    import torch

    from benchmarks.gpu.baseline_llamacpp import measure_llamacpp
    from benchmarks.gpu.baseline_tinychat import begin_compiling
    from benchmarks.gpu.checks import check_all
    from benchmarks.gpu.gpu_state import measure_card
    from benchmarks.gpu.plot import plot
    from benchmarks.gpu.products import (
        measure_baselines,
        measure_prefill,
        measure_products,
        measure_stream,
    )
    from benchmarks.gpu.steps import measure_boundaries, measure_steps

    stages = {
        stage.__name__.removeprefix("measure_"): stage
        for stage in (
            measure_stream, measure_steps, measure_card, measure_products, measure_prefill,
            measure_baselines, measure_llamacpp, measure_boundaries,
        )
    }  # fmt: skip
    if unknown := set(only or ()) - stages.keys():
        print(f"error: no stage {unknown.pop()}; there are {', '.join(stages)}", file=sys.stderr)
        return 2
    device, sm = "cpu", 0
    if not rehearse:
        if not torch.cuda.is_available():
            print("error: torch finds no CUDA GPU; --rehearse needs none", file=sys.stderr)
            return 1
        major, minor = torch.cuda.get_device_capability()
        device, sm = "cuda", 10 * major + minor
    run = Run(device, sm, limit_s, out)
    if not rehearse:
        if not only or "baselines" in only:
            begin_compiling()
        if checked:
            _compile_ahead(sm)
    with torch.inference_mode():
        if checked and not check_all(run):
            print("error: a kernel disagrees with its reference; nothing was timed")
            return 1
        for name in only or stages:
            if run.left_s < LEAST_S:
                run.add("skipped", name, reason="no time left")
                continue
            with run.attempt(name):
                if name in APART and not only:
                    _run_apart(run, name)
                else:
                    stages[name](run)
    path = out.with_suffix(".png")
    print(f"{len(run.rows)} rows in {out}" + (f", {path}" if plot(run.rows, path) else ""))
    return 0


def _run_apart(run: Run, name: str) -> None:
    """A stage in a process of its own, whose rows come into the same file.

    Raises:
        subprocess.SubprocessError: it failed, or its time was up.
    """
    import torch

    if not run.rehearsed:
        torch.cuda.empty_cache()
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--only", name, "--unchecked",
        "--out", str(run.out), "--limit-s", str(run.left_s),
        *(["--rehearse"] if run.rehearsed else []),
    ]  # fmt: skip
    before = len(run.out.read_text("utf-8").splitlines()) if run.out.exists() else 0
    try:
        subprocess.run(command, cwd=REPOSITORY, timeout=run.left_s, check=True)
    finally:
        lines = run.out.read_text("utf-8").splitlines()[before:] if run.out.exists() else []
        run.rows += map(json.loads, lines)


def _compile_ahead(sm: int) -> None:
    """Fills Triton's memory from several processes, so that the run itself compiles little."""
    code = (
        "import sys; from benchmarks.gpu.environment import make_importable; make_importable();"
        "from benchmarks.gpu.steps import all_launches;"
        "from vila_deploy.kernels.aot import compile_all;"
        "sm = int(sys.argv[3]); compile_all(all_launches(sys.argv[1], sys.argv[2], sm), sm)"
    )
    wanted = [(m, p, str(sm)) for m in ("3B", "8B", "13B", "40B") for p in ("int4", "fp16")]

    def compile_one(row: tuple[str, str, str]) -> None:
        # What isn't compiled in time is compiled when it is launched.
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, "-c", code, *row], timeout=COMPILE_S)

    with ThreadPoolExecutor(len(wanted)) as pool:
        list(pool.map(compile_one, wanted))


if __name__ == "__main__":
    sys.exit(main())
