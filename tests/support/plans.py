"""Memory plans by the names of target and backend."""

from __future__ import annotations

from vila_deploy.backends.registry import get_backend
from vila_deploy.builder import fit, memory_plan
from vila_deploy.builder.memory_plan import EnginePlan
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.engine.target import Target


def plan_engine(
    config: VilaConfig,
    target: Target,
    backend: str,
    precision: str,
    limits: Limits,
    module_precision: ModulePrecision = ALL_FP16,
) -> EnginePlan:
    request = BuildRequest(target, limits, module_precision=module_precision)
    return memory_plan.plan_engine(config, get_backend(backend), precision, request)


def advise(config: VilaConfig, precision: str, limits: Limits, target: Target, backend: str) -> str:
    return fit.advise(config, get_backend(backend), precision, BuildRequest(target, limits))
