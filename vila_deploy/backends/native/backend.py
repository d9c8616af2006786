"""Backend native: this project's own kernels; built anywhere, run on CUDA GPUs through torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vila_deploy.backends.base import Backend
from vila_deploy.backends.native.capability import capability_of
from vila_deploy.backends.native.memory import estimate_memory
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.memory import MemoryEstimate
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.session import Session
from vila_deploy.engine.target import Target
from vila_deploy.formats.base import GROUP_SIZES
from vila_deploy.formats.module_dtypes import FP16, INT4, INT8
from vila_deploy.kernels.launch_mode import AUTOMATIC, possible_modes
from vila_deploy.utils.errors import VilaDeployError

# Query heads that share a key head fill at most one tensor core product.
MOST_HEADS_IN_GROUP = 16


class NativeBackend(Backend):
    """Implements `Backend` for CUDA GPUs of every target."""

    name = "native"
    # Slots of a session; a decoding step takes 8 sequences at a time.
    max_batch_size = 64
    offloads = True

    def check_model(self, config: VilaConfig, request: BuildRequest) -> None:
        llm = config.llm
        capability = capability_of(request.target)
        for launch_mode in possible_modes(request.kernel_launch or AUTOMATIC, capability):
            launch_mode.check(capability)
        if llm.quantization is not None and llm.quantization.group_size not in GROUP_SIZES:
            raise VilaDeployError(
                f"backend native takes group sizes {', '.join(map(str, GROUP_SIZES))}, found "
                f"{llm.quantization.group_size}",
                where="llm/config.json: quantization_config.group_size",
                fix="quantize again with --group-size 128",
            )
        if llm.num_heads // llm.num_kv_heads > MOST_HEADS_IN_GROUP:
            raise VilaDeployError(
                f"backend native takes up to {MOST_HEADS_IN_GROUP} query heads for a key head, "
                f"found {llm.num_heads // llm.num_kv_heads}",
                where="llm/config.json: num_key_value_heads",
                fix="use another backend",
            )

    def check_tools(self, request: BuildRequest) -> None:
        from vila_deploy.backends.native import require_triton

        require_triton()

    def supported_dtypes(self, target: Target) -> Mapping[str, Sequence[str]]:
        return {"vision": (INT8,), "lm_head": (INT8, INT4), "kv_cache": (INT8,)}

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
        from vila_deploy.backends.native.build import build

        return build(folder, config, weights, request)

    def evaluated_dialect(self, request: BuildRequest) -> str:
        """Return a dialect of TensorRT, whose graphs hold the same towers and int4 heads."""
        alone = _only_native(request.module_precision)
        if alone:
            raise self._no_graphs(f", and no other has its {alone}")
        return "standard"

    def open(self, folder: Path, manifest: Manifest, slots: int = 1) -> Session:
        from vila_deploy.backends.native import open_session

        return open_session(folder, manifest, slots)

    def free_memory_bytes(self) -> int:
        from vila_deploy.backends.native.loading import find_device, free_memory_bytes

        device, _ = find_device()
        return free_memory_bytes(device)

    def gpu_name(self) -> str | None:
        from vila_deploy.backends.native.loading import find_device

        device, _ = find_device()
        # Triton's interpreter runs on the CPU.
        return None if device == "cpu" else super().gpu_name()


def _only_native(modules: ModulePrecision) -> str:
    """Options of what no graph has as this backend has it: its int8 heads have a scale a group."""
    options = [f"--kv-cache {modules.kv_cache}"] * (modules.kv_cache != FP16)
    options += [f"--lm-head {INT8}"] * (modules.lm_head == INT8)
    return " and ".join(options)


BACKEND = NativeBackend()
