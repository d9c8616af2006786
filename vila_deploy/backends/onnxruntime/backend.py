"""Backend onnxruntime: ONNX files for the CPU, which any computer builds and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vila_deploy.backends.base import Backend
from vila_deploy.backends.onnxruntime.memory import estimate_memory, float_tower_bytes
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import parameters, tower_tensor_specs
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.memory import MemoryEstimate
from vila_deploy.engine.precision import DefaultChoice
from vila_deploy.engine.session import Session
from vila_deploy.engine.target import Target
from vila_deploy.formats.module_dtypes import (
    FP16,
    HEAD_GROUP_SIZES,
    INT4,
    INT8,
    head_group_size,
)
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes

HEAD_DIM_MULTIPLE = 8
# Weights of a tower below which rounding its activations takes longer than int8 products save.
SMALL_TOWER = 1 << 18
# Figures of benchmarks/results/cpu-choices.jsonl and cpu-engine.jsonl; the defaults together add at
# most 5% to the KL divergence that 4 bits cost. An int8 cache alone would add more.
HEAD_REASON = "a quarter of float32's bytes, for 0.6% more KL divergence than 4 bits cost"
VISION_REASON = (
    "half of float32's time and a quarter of its bytes, if features stay close when it is built"
)
ACTIVATIONS_REASON = (
    "prefill takes 0.6 of float32's time, for 1.2% more KL divergence than 4 bits cost"
)


class OnnxRuntimeBackend(Backend):
    """Implements `Backend` for CPUs."""

    name, device = "onnxruntime", "processor"
    cache_bits = 32
    linear_bits = (4, 5, 8)
    opens_while_checking = smooths_tower = True

    def check_model(self, config: VilaConfig, request: BuildRequest) -> None:
        llm = config.llm
        if llm.quantization is not None:
            from vila_deploy.onnx_export.dialects.onnxruntime import check_group_size

            where = "llm/config.json: quantization_config.group_size"
            check_group_size(llm.quantization.group_size, where)
        if request.module_precision.lm_head != FP16:
            head_group_size(llm.hidden_size)
        if llm.head_dim % HEAD_DIM_MULTIPLE:
            raise VilaDeployError(
                f"backend onnxruntime takes multiples of {HEAD_DIM_MULTIPLE}, found {llm.head_dim}",
                where="llm/config.json: head_dim",
                fix="use another model",
            )

    def supported_dtypes(self, target: Target) -> Mapping[str, Sequence[str]]:
        return {"vision": (INT8,), "lm_head": (INT8, INT4), "kv_cache": (INT8,)}

    def default_dtype(self, module: str, config: VilaConfig, precision: str) -> DefaultChoice:
        if precision != INT4:
            return DefaultChoice(FP16)
        if module == "vision" and parameters(tower_tensor_specs(config)) < SMALL_TOWER:
            return DefaultChoice(FP16, "int8 would not be faster in so small a tower")
        if module == "vision" and available_memory_bytes() < float_tower_bytes(config):
            return DefaultChoice(FP16, "too little memory to check an int8 tower against float32")
        if module == "vision":
            return DefaultChoice(INT8, VISION_REASON)
        if module == "lm_head" and config.llm.hidden_size % HEAD_GROUP_SIZES[-1] == 0:
            return DefaultChoice(INT8, HEAD_REASON)
        return DefaultChoice(FP16)

    def default_activations(self) -> DefaultChoice:
        return DefaultChoice(INT8, ACTIVATIONS_REASON)

    def estimate_memory(
        self, config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
    ) -> MemoryEstimate:
        return estimate_memory(config, request, precision)

    def build(
        self,
        folder: Path,
        config: VilaConfig,
        weights: ModelWeights,
        request: BuildRequest,
    ) -> BuildResult:
        from vila_deploy.backends.onnxruntime.build import build

        return build(folder, config, weights, request)

    def evaluated_dialect(self, request: BuildRequest) -> str:
        return self.name

    def open(self, folder: Path, manifest: Manifest, slots: int = 1) -> Session:
        from vila_deploy.backends.onnxruntime import open_session

        return open_session(folder, manifest, slots)

    def gpu_name(self) -> str | None:
        return None


BACKEND = OnnxRuntimeBackend()
