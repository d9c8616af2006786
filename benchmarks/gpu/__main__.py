"""`python -m benchmarks.gpu`: check, then time; one JSON line a figure, and a plot."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.environment import REPOSITORY, Run
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability

# Seconds of a run, and what a stage must have left of them to begin.
LIMIT_S, LEAST_S = 560.0, 30.0
# One of these modes may hang, and a graph that another stage failed to capture must not stop it.
IN_A_PROCESS = ("launch_modes",)
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
    only = arguments.only and arguments.only.split(",")
    checked, out = not arguments.unchecked, arguments.out.resolve()
    return benchmark(out, arguments.limit_s, only, rehearse=arguments.rehearse, checked=checked)


def benchmark(
    out: Path, limit_s: float, only: list[str] | None, *, rehearse: bool, checked: bool = True
) -> int:
    """Run all stages in turn; return 1, with nothing timed, if a check fails."""
    import torch

    from benchmarks.gpu.baseline_llamacpp import measure_llamacpp
    from benchmarks.gpu.baseline_tinychat import begin_compiling
    from benchmarks.gpu.checks import check_all
    from benchmarks.gpu.memory_limit import measure_memory_limit
    from benchmarks.gpu.plot import plot
    from benchmarks.gpu.products import (
        measure_baselines,
        measure_prefill,
        measure_products,
        measure_stream,
    )
    from benchmarks.gpu.prompt_lookup import measure_lookup
    from benchmarks.gpu.steps import measure_launch_modes, measure_steps

    stages = {
        stage.__name__.removeprefix("measure_"): stage
        for stage in (
            measure_stream, measure_steps, measure_memory_limit, measure_products, measure_prefill,
            measure_baselines, measure_llamacpp, measure_lookup, measure_launch_modes,
        )
    }  # fmt: skip
    if unknown := set(only or ()) - stages.keys():
        print(f"error: no stage {unknown.pop()}; there are {', '.join(stages)}", file=sys.stderr)
        return 2
    device, capability = "cpu", INTERPRETER
    if not rehearse:
        if not torch.cuda.is_available():
            print("error: torch finds no CUDA GPU; --rehearse needs none", file=sys.stderr)
            return 1
        device, capability = "cuda", ComputeCapability(*torch.cuda.get_device_capability())
    run = Run(device, capability, limit_s, out)
    if not rehearse:
        if not only or "baselines" in only:
            begin_compiling()
        if checked:
            _compile_ahead(capability)
    with torch.inference_mode():
        if checked and not check_all(run):
            print("error: a kernel disagrees with its reference; nothing was timed")
            return 1
        for name in only or stages:
            if run.left_s < LEAST_S:
                run.add("skipped", name, reason="no time left")
                continue
            with run.attempt(name):
                if name in IN_A_PROCESS and not only:
                    _run_in_process(run, name)
                else:
                    stages[name](run)
    path = out.with_suffix(".png")
    print(f"{len(run.rows)} rows in {out}" + (f", {path}" if plot(run.rows, path) else ""))
    return 0


def _run_in_process(run: Run, name: str) -> None:
    """Run a stage in a process of its own, whose rows come into the same file.

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


def _compile_ahead(capability: ComputeCapability) -> None:
    """Fill Triton's cache from several processes, so that the run itself compiles little."""
    code = (
        "import sys; from benchmarks.gpu.steps import all_launches;"
        "from vila_deploy.kernels.aot import compile_all;"
        "from vila_deploy.kernels.capability import ComputeCapability;"
        "gpu = ComputeCapability.parse(sys.argv[3]);"
        "compile_all(all_launches(sys.argv[1], sys.argv[2], gpu), gpu)"
    )
    models = [(m, p, str(capability)) for m in ("3B", "8B", "13B", "40B") for p in ("int4", "fp16")]

    def compile_one(row: tuple[str, str, str]) -> None:
        # A kernel that isn't compiled in time is compiled when it is launched.
        with suppress(subprocess.TimeoutExpired):
            command = [sys.executable, "-c", code, *row]
            subprocess.run(command, timeout=COMPILE_S, cwd=REPOSITORY)

    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(compile_one, models))


if __name__ == "__main__":
    sys.exit(main())
