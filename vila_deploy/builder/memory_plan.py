"""What an engine will take on its target, from the configs alone; each backend knows its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vila_deploy.backends.base import Backend
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.memory import MemoryRow, memory_limit_bytes
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.utils.estimates import MemoryItem, PlanStep

# Python with the libraries that write graphs.
GRAPH_PROGRAM_BYTES = 600 << 20


@dataclass(frozen=True)
class EnginePlan:
    """Memory while running (`device_bytes`) against what the target has (`limit_bytes`).

    Args:
        items: the parts of that memory; key `components` for programs.
        steps: what is done where, with the memory that it takes there; key `stages`.
        module_precision: dtypes that `items` are counted in; key `kept_as`.
        in_host_memory: modules that stay in the memory of the host that the GPU is in.
    """

    target: str
    backend: str
    precision: str
    fits: bool
    device_bytes: int
    limit_bytes: int
    items: Mapping[MemoryRow, MemoryItem]
    steps: tuple[PlanStep, ...]
    module_precision: ModulePrecision = ALL_FP16
    in_host_memory: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--plan --json` prints, whose keys are stable."""
        return {
            "target": self.target,
            "backend": self.backend,
            "precision": self.precision,
            "fits": self.fits,
            "device_bytes": self.device_bytes,
            "limit_bytes": self.limit_bytes,
            "components": [asdict(item) for item in self.items.values()],
            "stages": [asdict(step) for step in self.steps],
            "kept_as": self.module_precision.to_json(),
            "in_host_memory": list(self.in_host_memory),
        }


def plan_engine(
    config: VilaConfig, backend: Backend, precision: str, request: BuildRequest
) -> EnginePlan:
    """Return bytes of weights, cache and activations on each GPU of the target.

    Args:
        precision: of the LLM's linears, "int4" or "fp16".
    """
    target = request.target
    limit_bytes = memory_limit_bytes(target)
    estimate = backend.estimate_memory(config, request, precision, limit_bytes)
    several = f", each of {request.gpus}" if request.gpus > 1 else ""
    return EnginePlan(
        target=target.name,
        backend=backend.name,
        precision=precision,
        fits=estimate.device_bytes <= limit_bytes,
        device_bytes=estimate.device_bytes,
        limit_bytes=limit_bytes,
        items=estimate.items,
        steps=(
            PlanStep("build graphs on this computer", _graph_bytes(config)),
            *estimate.build_steps,
            PlanStep(f"run on {target.title}{several}", estimate.device_bytes),
            *estimate.run_notes,
        ),
        module_precision=request.module_precision,
        in_host_memory=tuple(estimate.in_host_memory),
    )


def _graph_bytes(config: VilaConfig) -> int:
    """Memory while graphs are written: two decoder layers, or the head, as they are rounded."""
    layer = sum(map(math.prod, config.llm.linears.values())) * 4
    head = config.llm.vocab_size * config.llm.hidden_size * 6
    return GRAPH_PROGRAM_BYTES + max(2 * layer, head)
