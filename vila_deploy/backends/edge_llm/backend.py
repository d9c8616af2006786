"""Backend edge-llm: the LLM for TensorRT-Edge-LLM's exporter, the vision encoder as ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vila_deploy.backends.base import Backend
from vila_deploy.backends.edge_llm import files
from vila_deploy.backends.tensorrt.memory import contiguous_step, max_matrix_bytes
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import TOKENIZER_FOLDER, Manifest, PendingStep
from vila_deploy.engine.memory import (
    MemoryEstimate,
    MemoryRow,
    Storage,
    activation_item,
    cache_item,
    decoder_activations,
    tower_activations,
    weight_items,
)
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.session import Session
from vila_deploy.engine.target import Target
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import PlanStep
from vila_deploy.utils.progress import progress

EXPORT_STEP = PendingStep("export", "export the language model with tensorrt-edgellm-export")
GROUP_SIZE = 128
# Symmetric weights have no zero points.
STORAGE = Storage(zero_bits=0)
# The exporter holds all weights while it packs them again, and PyTorch.
EXPORTER_FACTOR, EXPORTER_BYTES = 3, 2 << 30
# The dialect of the vision graph: operators of TensorRT 10.3.
DIALECT = "primitive"


class EdgeLlmBackend(Backend):
    """Implements `Backend`; the pending step is NVIDIA's exporter, its engines are not opened."""

    name = "edge-llm"
    max_batch_size = 8

    def check_model(self, config: VilaConfig, request: BuildRequest) -> None:
        quantization = config.llm.quantization
        where = "llm/config.json: quantization_config"
        fix = f"run vila-quantize with --symmetric --group-size {GROUP_SIZE}"
        if quantization is not None and quantization.zero_point:
            raise VilaDeployError(
                "TensorRT-Edge-LLM has no zero points: it would move them into the 4-bit values "
                "and cut off what exceeds 4 bits, without a word",
                where=where,
                fix=fix,
            )
        if quantization is not None and quantization.group_size != GROUP_SIZE:
            raise VilaDeployError(
                f"TensorRT-Edge-LLM's 4-bit kernels have groups of {GROUP_SIZE}, found "
                f"{quantization.group_size}",
                where=where,
                fix=fix,
            )
        for name, (_, inputs) in config.llm.linears.items():
            if quantization is not None and inputs % GROUP_SIZE:
                raise VilaDeployError(
                    f"{name} has {inputs} inputs, no multiple of {GROUP_SIZE}",
                    where=where,
                    fix="build from the fp16 checkpoint",
                )
        if config.llm.rope_factor != 1:
            raise VilaDeployError(
                "the model's linear rope scaling was never tried with TensorRT-Edge-LLM",
                fix="use --backend tensorrt or --backend native",
            )

    def estimate_memory(
        self, config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
    ) -> MemoryEstimate:
        llm, limits, modules = config.llm, request.limits, request.module_precision
        widest = max(tower_activations(config), decoder_activations(llm, limits.max_input_len))
        items = {
            **weight_items(config, precision, STORAGE, modules),
            MemoryRow.KV_CACHE: cache_item(llm, limits, STORAGE, modules.kv_cache),
            MemoryRow.ACTIVATIONS: activation_item(widest + llm.vocab_size, STORAGE),
        }
        llm_bytes = sum(items[row].bytes for row in (MemoryRow.DECODER_LINEARS, MemoryRow.HEAD))
        steps = [
            PlanStep("export on a PC", EXPORTER_BYTES + EXPORTER_FACTOR * llm_bytes),
            PlanStep(f"llm_build on {request.target.title}", EXPORTER_FACTOR * llm_bytes),
        ]
        block = contiguous_step({MemoryRow.HEAD.value: head_bytes(config)}, request.target)
        return MemoryEstimate(items, build_steps=(*steps, *([block] if block else [])))

    def build(
        self,
        folder: Path,
        config: VilaConfig,
        weights: ModelWeights,
        request: BuildRequest,
    ) -> BuildResult:
        """Write llm_checkpoint/, the vision encoder's graphs and EDGE_LLM.md.

        Raises:
            VilaDeployError: random weights, which have no tokenizer, or weights that don't fit.
        """
        from importlib.metadata import version

        from vila_deploy.backends.edge_llm.checkpoint import write_checkpoint
        from vila_deploy.backends.edge_llm.instructions import instructions
        from vila_deploy.backends.tensorrt import graphs

        if not (folder / TOKENIZER_FOLDER).is_dir():
            raise VilaDeployError(
                "TensorRT-Edge-LLM's exporter needs a tokenizer, random weights have none",
                fix="build from a checkpoint",
            )
        llm, tower, projector = weights
        llm_config, largest = config.llm, max_matrix_bytes(request.target)
        steps = config.vision_layers_used + llm_config.num_layers + 2
        with progress(steps, "building") as advance:
            graphs.write_vision(
                folder, config, tower, projector, DIALECT, advance, max_matrix_bytes=largest
            )
            (folder / files.CHECKPOINT).mkdir()
            write_checkpoint(
                folder / files.CHECKPOINT, config, llm, folder / TOKENIZER_FOLDER, advance
            )
        block = contiguous_step({MemoryRow.HEAD.value: head_bytes(config)}, request.target)
        needed = 0 if block is None else block.memory_bytes
        text = instructions(request, config, head_bytes(config), needed)
        (folder / files.INSTRUCTIONS).write_text(text, "utf-8")
        return BuildResult(step_bytes(config), {"onnx": version("onnx")}, (EXPORT_STEP,))

    def finish_location(self, manifest: Manifest) -> str:
        return "a computer with tensorrt-edgellm"

    def unfinishable_reason(self, target: Target) -> str:
        return "TensorRT-Edge-LLM needs a tokenizer, which random weights have not"

    def check_device(self, folder: Path, manifest: Manifest) -> None:
        from vila_deploy.backends.edge_llm.exporter import find_exporter

        find_exporter()

    def artifacts(self, step: PendingStep) -> Sequence[str]:
        return files.EXPORTED, f"{files.EXPORTED}.partial"

    def finish_step(self, folder: Path, manifest: Manifest, step: PendingStep) -> Mapping[str, str]:
        from vila_deploy.backends.edge_llm.exporter import export

        export(folder)
        return {}

    def intermediates(self, folder: Path, step: PendingStep) -> Sequence[str]:
        names = sorted(path.name for path in (folder / files.CHECKPOINT).iterdir())
        return tuple(f"{files.CHECKPOINT}/{name}" for name in names)

    def open(self, folder: Path, manifest: Manifest, slots: int = 1) -> Session:
        raise VilaDeployError(
            "is for NVIDIA's TensorRT-Edge-LLM: llm_build and llm_inference on the board, not "
            "vila-chat",
            where=folder,
            fix=f"follow {files.INSTRUCTIONS} in it, or build with --backend tensorrt",
        )


def head_bytes(config: VilaConfig) -> int:
    """Return the bytes of the output head, which the exporter leaves in float16 and whole."""
    return 2 * config.llm.vocab_size * config.llm.hidden_size


def step_bytes(config: VilaConfig) -> int:
    """Return the bytes of weights that a decoding step reads."""
    precision = "fp16" if config.llm.quantization is None else "int4"
    items = weight_items(config, precision, STORAGE, ModulePrecision())
    rows = (MemoryRow.DECODER_LINEARS, MemoryRow.HEAD, MemoryRow.NORMS)
    return sum(items[row].bytes for row in rows)


BACKEND = EdgeLlmBackend()
