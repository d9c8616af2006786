"""The contract of a backend: all that builder, runtime, bench and the commands need of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import Manifest, PendingStep
from vila_deploy.engine.memory import MemoryEstimate
from vila_deploy.engine.precision import FP16, DefaultChoice, ModulePrecision
from vila_deploy.engine.session import Session
from vila_deploy.engine.target import Target
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes


class Backend(ABC):
    """Builds engines for its targets, finishes them on the device and opens them.

    Its module is imported for `--plan` too: heavy libraries belong into the methods that need
    them. A new backend has the abstract methods; the others have defaults for one that builds
    complete engines of fp16 modules.
    """

    name: ClassVar[str]
    device: ClassVar[str] = "GPU"
    max_batch_size: ClassVar[int] = 1
    takes_several_gpus: ClassVar[bool] = False
    # Whether modules that don't fit on the GPU stay in its host's memory.
    offloads: ClassVar[bool] = False
    # Whether an engine may be opened while its large files of numbers are still being checked.
    opens_while_checking: ClassVar[bool] = False
    # Whether `build` smooths a tower that it stores in int8; else it gets a smoothed one.
    smooths_tower: ClassVar[bool] = False
    # Of a value in a key/value cache that is not quantized.
    cache_bits: ClassVar[int] = 16
    linear_bits: ClassVar[tuple[int, ...]] = (4,)

    # What it can build.

    def check(self, config: VilaConfig, request: BuildRequest) -> None:
        """Raise VilaDeployError for what can't be built, whatever is installed; before any work."""
        batch = request.limits.max_batch_size
        if batch > self.max_batch_size:
            raise VilaDeployError(
                f"--max-batch-size {batch} is more than this backend's {self.max_batch_size}",
                fix=f"use --max-batch-size {self.max_batch_size}",
            )
        if request.gpus > 1 and not self.takes_several_gpus:
            raise VilaDeployError(
                f"backend {self.name} runs on one {self.device}, --tp and --pp are for several "
                "GPUs",
                fix="leave them out, or use --backend tensorrt-llm",
            )
        quantization = config.llm.quantization
        if quantization is not None and not quantization.layer_bits <= set(self.linear_bits):
            raise VilaDeployError(
                f"backend {self.name} takes linears in 4 bits, this checkpoint has some in "
                f"{max(quantization.layer_bits)}",
                where="llm/config.json: quantization_config",
                fix="use --target cpu or --backend llamacpp, or quantize without --bits-per-weight",
            )
        self.check_model(config, request)

    @abstractmethod
    def check_model(self, config: VilaConfig, request: BuildRequest) -> None:
        """Raise VilaDeployError if this backend can't build the model for that request."""

    def check_tools(self, request: BuildRequest) -> None:  # noqa: B027
        """Raise VilaDeployError if a library that building needs here is missing or too old."""

    def check_alias(self, alias: str, target: Target) -> None:  # noqa: B027
        """Raise VilaDeployError if `--backend alias` doesn't mean this backend on `target`."""

    def notes(self, request: BuildRequest) -> Sequence[str]:
        """Return what a user should know of this backend on the target before work starts."""
        return ()

    def title(self, target: Target) -> str:
        """Return what messages call this backend on `target`."""
        return self.name

    def supported_dtypes(self, target: Target) -> Mapping[str, Sequence[str]]:
        """Return the dtypes beside fp16 of each module, by its field of ModulePrecision."""
        return {}

    def unsupported_reason(self, target: Target, module: str) -> str:
        """Return why `module` has no other dtype on `target`; empty if there is no more to say."""
        return ""

    def default_dtype(self, module: str, config: VilaConfig, precision: str) -> DefaultChoice:
        """Return the dtype of a module for which the user gave `auto`; a build may revise it.

        Args:
            module: a field of ModulePrecision.
            precision: of the LLM's linears, "int4" or "fp16".
        """
        return DefaultChoice(FP16)

    def default_activations(self) -> DefaultChoice:
        """Return a name in ACTIVATIONS for 4-bit linears, if it takes that option."""
        raise NotImplementedError(f"backend {self.name} has no choice of activations")

    def supports(self, target: Target, module: str, dtype: str) -> bool:
        """Return whether `module` can be in `dtype` on `target`."""
        return dtype in (FP16, *self.supported_dtypes(target).get(module, ()))

    def supported_part(self, target: Target, asked: ModulePrecision) -> ModulePrecision:
        """Return `asked` with fp16 for each module that has no such dtype on `target`."""
        quantized = asked.quantized().items()
        unable = {name: FP16 for name, dtype in quantized if not self.supports(target, name, dtype)}
        return replace(asked, **unable)

    @abstractmethod
    def estimate_memory(
        self, config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
    ) -> MemoryEstimate:
        """Return what an engine will take on its device, on each GPU; reads no weights.

        Args:
            precision: of the LLM's linears, "int4" or "fp16".
            limit_bytes: what the device has for it.
        """

    # Building.

    @abstractmethod
    def build(
        self,
        folder: Path,
        config: VilaConfig,
        weights: ModelWeights,
        request: BuildRequest,
    ) -> BuildResult:
        """Write the engine's files into the empty `folder`, with memory for about one layer."""

    def evaluated_dialect(self, request: BuildRequest) -> str:
        """Return the dialect of the graphs in which the modules' accuracy can be measured.

        A key of onnx_export.dialects.registry.DIALECTS.

        Raises:
            VilaDeployError: this backend has no graphs that a CPU could run.
        """
        raise self._no_graphs()

    def _no_graphs(self, more: str = "") -> VilaDeployError:
        return VilaDeployError(
            f"backend {self.name} has no graphs that this computer could run{more}",
            where="--eval",
            fix="leave --eval out, or measure with --backend tensorrt or onnxruntime",
        )

    # Finishing on the device, for a backend that leaves steps to it.

    def finish_location(self, manifest: Manifest) -> str:
        """Return in words where the pending steps can be done."""
        return "the device"

    def unfinishable_reason(self, target: Target) -> str:
        """Return why an engine begun here can't be finished here, known before any work.

        Empty if it can, as far as one knows before.

        Raises:
            VilaDeployError: this is the right computer, but a tool is missing.
        """
        return ""

    def check_device(self, folder: Path, manifest: Manifest) -> None:  # noqa: B027
        """Raise VilaDeployError if this computer lacks what the pending steps need."""

    def artifacts(self, step: PendingStep) -> Sequence[str]:
        """Return the paths in the folder that `step` makes; a killed one may have left some."""
        return ()

    def finish_step(self, folder: Path, manifest: Manifest, step: PendingStep) -> Mapping[str, str]:
        """Make the artifacts of `step` and return the versions of the tools that did.

        Raises:
            VilaDeployError: the step failed.
        """
        raise NotImplementedError(f"backend {self.name} leaves no steps")

    def intermediates(self, folder: Path, step: PendingStep) -> Sequence[str]:
        """Return the files in `folder` that nothing needs once `step` is done."""
        return ()

    # Running.

    @abstractmethod
    def open(self, folder: Path, manifest: Manifest, slots: int = 1) -> Session:
        """Return a session of the engine in `folder`, whose files match `manifest`.

        Args:
            slots: sequences to hold at once, where that is not decided when an engine is built;
                the session's `slots` says how many there are.

        Raises:
            VilaDeployError: a library, GPU or memory that it needs is not here.
        """

    def free_memory_bytes(self) -> int:
        """Return the free bytes of what an engine's weights and caches lie in.

        Raises:
            VilaDeployError: this computer lacks the GPU.
        """
        return available_memory_bytes()

    def gpu_name(self) -> str | None:
        """Return the name of the GPU that this backend runs on here; None if it is a CPU.

        Raises:
            VilaDeployError: no GPU is here, or CUDA reports an error.
        """
        import torch

        return torch.cuda.get_device_name()
