"""Backend tensorrt-llm: its checkpoint written anywhere, its engines built on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vila_deploy.backends.base import Backend
from vila_deploy.backends.tensorrt_llm.memory import estimate_memory
from vila_deploy.backends.tensorrt_llm.releases import release_for
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import Manifest, PendingStep
from vila_deploy.engine.memory import MemoryEstimate
from vila_deploy.engine.session import Session
from vila_deploy.utils.errors import VilaDeployError


class TensorRtLlmBackend(Backend):
    """Implements `Backend`; the pending steps are the vision engine and the LLM's engines."""

    name = "tensorrt-llm"
    max_batch_size = 256
    takes_several_gpus = True

    def check_model(self, config: VilaConfig, request: BuildRequest) -> None:
        release_for(request.target.compute_capability, request.target.name)
        if config.llm.family.name != "llama":
            raise VilaDeployError(
                "TensorRT-LLM never had engines for NVILA (Qwen2)",
                fix="use --backend tensorrt or --backend native",
            )
        if config.tiling.mode != "single":
            raise VilaDeployError(
                f"TensorRT-LLM's vision engines take one image size, this model tiles them "
                f"({config.tiling.mode})",
                fix="use --backend tensorrt or --backend native",
            )
        # Only here, since these modules need torch.
        from vila_deploy.checkpoint.trtllm_sharding import Parallel, check_llm
        from vila_deploy.formats import trtllm

        quantization = config.llm.quantization
        if quantization is not None and quantization.zero_point:
            raise trtllm.asymmetric("llm/config.json: quantization_config.zero_point")
        group_size = None if quantization is None else quantization.group_size
        check_llm(config.llm, group_size, Parallel(request.tp, request.pp))

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
        from vila_deploy.backends.tensorrt_llm.build import build

        return build(folder, config, weights, request)

    def check_device(self, folder: Path, manifest: Manifest) -> None:
        from vila_deploy.backends.tensorrt_llm.build import check_device

        check_device(folder, manifest)

    def artifacts(self, step: PendingStep) -> Sequence[str]:
        from vila_deploy.backends.tensorrt_llm.build import artifacts

        return artifacts(step)

    def finish_step(self, folder: Path, manifest: Manifest, step: PendingStep) -> Mapping[str, str]:
        from vila_deploy.backends.tensorrt_llm.build import finish_step

        return finish_step(folder, manifest, step)

    def intermediates(self, folder: Path, step: PendingStep) -> Sequence[str]:
        from vila_deploy.backends.tensorrt_llm.build import intermediates

        return intermediates(folder, step)

    def open(self, folder: Path, manifest: Manifest, slots: int = 1) -> Session:
        from vila_deploy.backends.tensorrt_llm import open_session

        return open_session(folder, manifest)


BACKEND = TensorRtLlmBackend()
