"""On which targets a model fits, and what to change where it doesn't."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from vila_deploy.backends.base import Backend
from vila_deploy.backends.registry import get_backend
from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.engine.target import Target, load_targets

SEQUENCE_STEP = 256


@dataclass(frozen=True)
class Fit:
    """Whether a model fits on a target; `advice` is the change that makes it fit, else empty."""

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
    """Return for every target whether the model fits on one of its GPUs; reads no weights.

    Targets that stand for GPUs of any size are left out.

    Args:
        module_precision: fp16 is taken instead of what a target's backend doesn't have.
        backend: is taken where a target has it, elsewhere and by default the target's default.
    """
    return [
        _fit(config, precision, limits, target, module_precision, backend)
        for target in load_targets().values()
        if target.is_one_device
    ]


def _fit(
    config: VilaConfig,
    precision: str,
    limits: Limits,
    target: Target,
    module_precision: ModulePrecision,
    asked: str | None,
) -> Fit:
    backend = get_backend(asked if asked in target.backends else target.default_backend)
    able = backend.supported_part(target, module_precision)
    request = BuildRequest(target, limits, module_precision=able)
    plan = plan_engine(config, backend, precision, request)
    advice = "" if plan.fits else advise(config, backend, precision, request)
    sizes = plan.device_bytes, plan.limit_bytes
    return Fit(target.name, target.title, backend.name, plan.fits, *sizes, advice)


def advise(config: VilaConfig, backend: Backend, precision: str, request: BuildRequest) -> str:
    """Return the smallest change that makes a model fit, on one GPU, that doesn't."""
    request = replace(request, tp=1, pp=1)
    target, limits = request.target, request.limits

    def needed(precision: str, request: BuildRequest) -> int:
        return plan_engine(config, backend, precision, request).device_bytes

    limit = plan_engine(config, backend, precision, request).limit_bytes
    least = config.max_tokens_per_image + SEQUENCE_STEP
    for length in range(limits.max_seq_len - SEQUENCE_STEP, least - 1, -SEQUENCE_STEP):
        shorter = replace(
            limits, max_seq_len=length, max_input_len=min(limits.max_input_len, length)
        )
        if needed(precision, replace(request, limits=shorter)) <= limit:
            return f"vila-build-engine --max-seq-len {length}"
    for other in map(get_backend, target.backends):
        if other.offloads and other.name != backend.name:
            able = other.supported_part(target, request.module_precision)
            offloaded = replace(request, module_precision=able)
            if plan_engine(config, other, precision, offloaded).fits:
                return f"vila-build-engine --backend {other.name}"
    quantized = needed("int4", request)
    if precision == "fp16" and quantized <= limit:
        return f"quantize it first: int4 needs {quantized / 1e9:.1f} GB"
    smallest = min(quantized, needed(precision, request))
    return f"a smaller model, or a device with {smallest / 1e9:.0f} GB to spare"
