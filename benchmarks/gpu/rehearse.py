"""Every stage at tiny shapes on the CPU, in this process: shows that each runs, not how fast."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.plan import Plan

# They compile for a GPU, are tests of one, or do the same without one.
NOT_INTERPRETED = {"prepare", "tests", "compile", "pack", "quantize"}


def rehearse(plan: Plan, out: Path) -> int:
    """Run the stages of `plan`; return 1 if a check fails."""
    import torch

    from benchmarks.gpu.environment import Run
    from benchmarks.gpu.registry import load_stage
    from vila_deploy.kernels.capability import INTERPRETER

    run = Run("cpu", INTERPRETER, plan.limit_s, out)
    with torch.inference_mode():
        for name in plan.stages:
            if name in NOT_INTERPRETED:
                continue
            run.stage = name
            with run.attempt(name):
                load_stage(name)(run)
    print(f"{len(run.rows)} rows in {out}")
    return int(any(row.get("agrees") is False for row in run.rows))
