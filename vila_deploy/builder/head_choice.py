"""The output head in the fewest bits whose change of the logits stays within a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vila_deploy.builder.resolve import BUILTIN_DATA, BuildOptions, ResolvedBuild
from vila_deploy.engine.precision import AUTO, ModulePrecision
from vila_deploy.formats.module_dtypes import FP16, INT4, INT8
from vila_deploy.utils.errors import VilaDeployError

# The fewest bits first. float16 is what is left.
CANDIDATES = (INT4, INT8)
# Heads are rounded alike in every backend, but for native's int8 head, whose scales are finer: so
# one dialect measures for all.
DIALECT = "onnxruntime"


def check_kl_bound(options: BuildOptions) -> None:
    """Raise VilaDeployError unless the bound is a number that has a head to choose."""
    bound = options.kl_bound
    if bound is None:
        return
    if not (math.isfinite(bound) and bound >= 0):
        raise VilaDeployError(f"--kl-bound is {bound}", fix="give nats, e.g. 0.001")
    if options.module_precision.lm_head != AUTO:
        raise VilaDeployError(
            f"--kl-bound chooses the output head, and --lm-head {options.module_precision.lm_head} "
            "is given",
            fix="leave one of them out",
        )


def choose_lm_head(build: ResolvedBuild, bound: float, scratch: Path) -> ResolvedBuild:
    """Return `build` with the head in the fewest bits whose mean KL is at most `bound` nats.

    The KL is that from a float16 head, over the held-out data of --eval, or the built-in ones.

    Args:
        scratch: a folder in which a temporary one may be made.

    Raises:
        VilaDeployError: data that can't be read.
    """
    from vila_deploy.builder.accuracy_impact import measure_accuracy_impact

    data = None if build.eval_data in (None, *BUILTIN_DATA) else build.eval_data
    measured: dict[str, float] = {}
    for dtype in CANDIDATES:
        if not build.backend.supports(build.target, "lm_head", dtype):
            continue
        modules = ModulePrecision(lm_head=dtype)
        impact = measure_accuracy_impact(build.checkpoint, modules, DIALECT, data, scratch)
        measured[dtype] = impact.kl_mean
        if impact.kl_mean <= bound:
            break
    return _with_head(build, choice(measured, bound), reason(measured, bound))


def choice(measured: Mapping[str, float], bound: float) -> str:
    """Return the first dtype whose KL is within the bound, FP16 if there is none."""
    return next((dtype for dtype, kl in measured.items() if kl <= bound), FP16)


def reason(measured: Mapping[str, float], bound: float) -> str:
    """Return what was measured, in one line."""
    found = ", ".join(f"{dtype} {kl:.2g}" for dtype, kl in measured.items())
    if not found:
        return "the backend has no other"
    return f"mean KL from a float16 head in nats: {found}; --kl-bound {bound:g}"


def _with_head(build: ResolvedBuild, dtype: str, why: str) -> ResolvedBuild:
    request = build.request
    modules = replace(request.module_precision, lm_head=dtype)
    defaults = {**request.defaults, "lm_head": why}
    chosen = replace(build, request=replace(request, module_precision=modules, defaults=defaults))
    if not modules.quantized() and request.activations != INT8:
        # --eval has nothing left to measure.
        chosen = replace(chosen, eval_data=None)
    return chosen
