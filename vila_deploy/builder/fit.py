"""On which targets a model fits, and what to change where it doesn't."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision, supported_part
from vila_deploy.engine.target import Target, load_targets

SEQUENCE_STEP = 256
NATIVE = "native"


@dataclass(frozen=True)
class Fit:
    """`advice` says what makes it fit; empty where it does."""

    target: str
    title: str
    backend: str
    fits: bool
    device_bytes: int
    limit_bytes: int
    advice: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit_everywhere(
    config: VilaConfig,
    precision: str,
    limits: Limits,
    module_precision: ModulePrecision = ALL_FP16,
    backend: str | None = None,
) -> list[Fit]:
    """The model on every target; no weights are read.

    Args:
        module_precision: fp16 is taken instead of what a target's backend doesn't have.
        backend: is taken where a target has it, elsewhere and by default the target's default.
    """
    return [
        _fit(config, precision, limits, each, module_precision, backend)
        for each in load_targets().values()
    ]


def _fit(
    config: VilaConfig,
    precision: str,
    limits: Limits,
    target: Target,
    module_precision: ModulePrecision,
    backend: str | None,
) -> Fit:
    backend = backend if backend in target.backends else target.default_backend
    able = supported_part(target, backend, module_precision)
    plan = plan_engine(config, target, backend, precision, limits, able)
    advice = "" if plan.fits else advise(config, precision, limits, target, backend, able)
    needs = plan.device_bytes, plan.limit_bytes
    return Fit(target.name, target.title, backend, plan.fits, *needs, advice)


def advise(
    config: VilaConfig,
    precision: str,
    limits: Limits,
    target: Target,
    backend: str,
    module_precision: ModulePrecision = ALL_FP16,
) -> str:
    """The smallest change that makes a model fit that doesn't."""

    def needed(precision: str, limits: Limits) -> int:
        return plan_engine(
            config, target, backend, precision, limits, module_precision
        ).device_bytes

    limit = plan_engine(config, target, backend, precision, limits, module_precision).limit_bytes
    least = config.max_tokens_per_image + SEQUENCE_STEP
    for length in range(limits.max_seq_len - SEQUENCE_STEP, least - 1, -SEQUENCE_STEP):
        shorter = replace(
            limits, max_seq_len=length, max_input_len=min(limits.max_input_len, length)
        )
        if needed(precision, shorter) <= limit:
            return f"vila-build-engine --max-seq-len {length}"
    # The only backend that can leave parts in the memory of a card's host.
    if backend != NATIVE and NATIVE in target.backends:
        able = supported_part(target, NATIVE, module_precision)
        if plan_engine(config, target, NATIVE, precision, limits, able).fits:
            return f"vila-build-engine --backend {NATIVE}"
    quantized = needed("int4", limits)
    if precision == "fp16" and quantized <= limit:
        return f"quantize it first: int4 needs {quantized / 1e9:.1f} GB"
    smallest = min(needed("int4", limits), needed(precision, limits))
    return f"a smaller model, or a device with {smallest / 1e9:.0f} GB to spare"
