"""Backend llamacpp: llama.cpp's decoder behind our vision encoder, on every processor it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vila_deploy.backends.base import Backend
from vila_deploy.backends.llamacpp.memory import BLOCK, estimate_memory, gpu_kind
from vila_deploy.backends.onnxruntime.backend import HEAD_REASON, VISION_REASON
from vila_deploy.backends.onnxruntime.memory import float_tower_bytes
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.memory import MemoryEstimate
from vila_deploy.engine.precision import DefaultChoice
from vila_deploy.engine.session import Session
from vila_deploy.engine.target import Target
from vila_deploy.formats.module_dtypes import FP16, INT4, INT8
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes


class LlamaCppBackend(Backend):
    """Implements `Backend` for CPUs and for GPUs through CUDA, Metal and Vulkan."""

    name, device = "llamacpp", "GPU or processor"
    offloads = smooths_tower = True
    linear_bits = (4, 5, 8)

    def check_model(self, config: VilaConfig, request: BuildRequest) -> None:
        llm = config.llm
        if request.gpu_layers is not None and gpu_kind(request.target) is None:
            raise VilaDeployError(
                f"--gpu-layers is for a GPU, target {request.target.name} is none",
                fix="leave it out, or choose the --target of the GPU",
            )
        group = llm.quantization.group_size if llm.quantization else BLOCK
        if group % BLOCK:
            raise VilaDeployError(
                f"llama.cpp has a scale for {BLOCK} weights or several times {BLOCK}, not for "
                f"{group}",
                where="llm/config.json: quantization_config.group_size",
                fix="quantize again with --group-size 32, 64 or 128, or use --backend onnxruntime",
            )
        modules = request.module_precision
        for option, size, name in (
            (modules.lm_head, llm.hidden_size, "hidden_size"),
            (modules.kv_cache, llm.head_dim, "head_dim"),
        ):
            if option == INT8 and size % BLOCK:
                raise VilaDeployError(
                    f"llama.cpp's int8 has a scale for {BLOCK} values, {size} is no multiple",
                    where=f"llm/config.json: {name}",
                    fix="leave --lm-head and --kv-cache at fp16",
                )

    def supported_dtypes(self, target: Target) -> Mapping[str, Sequence[str]]:
        return {"vision": (INT8,), "lm_head": (INT8,), "kv_cache": (INT8,)}

    def default_dtype(self, module: str, config: VilaConfig, precision: str) -> DefaultChoice:
        if precision != INT4:
            return DefaultChoice(FP16)
        if module == "vision" and available_memory_bytes() < float_tower_bytes(config):
            return DefaultChoice(FP16, "too little memory to check an int8 tower against float32")
        if module == "vision":
            return DefaultChoice(INT8, VISION_REASON)
        if module == "lm_head" and config.llm.hidden_size % BLOCK == 0:
            return DefaultChoice(INT8, HEAD_REASON)
        return DefaultChoice(FP16)

    def estimate_memory(
        self, config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
    ) -> MemoryEstimate:
        return estimate_memory(config, request, precision, limit_bytes)

    def build(
        self,
        folder: Path,
        config: VilaConfig,
        weights: ModelWeights,
        request: BuildRequest,
    ) -> BuildResult:
        from vila_deploy.backends.llamacpp.build import build

        return build(folder, config, weights, request)

    def open(self, folder: Path, manifest: Manifest, slots: int = 1) -> Session:
        from vila_deploy.backends.llamacpp.session import LlamaCppSession

        return LlamaCppSession(folder, manifest, slots)

    def gpu_name(self) -> str | None:
        from vila_deploy.backends.llamacpp.library import gpus, load_library

        found = gpus(load_library())
        return found[0].title if found else None


BACKEND = LlamaCppBackend()
