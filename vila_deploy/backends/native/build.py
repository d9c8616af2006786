"""Write the files of an engine for the native backend; no GPU is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file

from vila_deploy.backends.native import files
from vila_deploy.backends.native.capability import capability_of
from vila_deploy.backends.native.compile import compile_engine
from vila_deploy.backends.native.memory import estimate_memory
from vila_deploy.backends.native.model_file import ModelFile, Prescales, write_model
from vila_deploy.backends.native.tower import tower_tensors
from vila_deploy.backends.native.weights import (
    Layer,
    PackedLlm,
    empty_llm,
    norm_prescales,
    pack_shards,
    shard_names,
    tensors,
)
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.memory import memory_limit_bytes
from vila_deploy.kernels.launch_mode import AUTOMATIC, possible_modes
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.progress import progress


def build(
    folder: Path,
    config: VilaConfig,
    weights: ModelWeights,
    request: BuildRequest,
) -> BuildResult:
    """Write packed weights, tower, sizes and the compiler's report into `folder`.

    Every kernel is compiled for the target. One decoder layer is in memory at a time.
    """
    max_seq_len, capability = request.limits.max_seq_len, capability_of(request.target)
    kernel_launch = request.kernel_launch or AUTOMATIC
    launch_modes = possible_modes(kernel_launch, capability)
    module_precision, in_host_memory = request.module_precision, host_parts(config, request)
    llm, tower, projector = weights
    steps = config.llm.num_layers + 1
    if in_host_memory:
        print(f"to fit, {' and '.join(in_host_memory)} stay in host memory", file=sys.stderr)
    with progress(steps + 2, "building") as advance:
        shards = pack_shards(config.llm, llm, max_seq_len, advance, module_precision.lm_head)
        prescales = _save_llm(folder, config, shards)
        model = ModelFile(config, prescales, in_host_memory, kernel_launch)
        write_model(folder / files.MODEL, model)
        vision = tower_tensors(config, tower, projector, module_precision.vision)
        save_file({n: tensor.contiguous() for n, tensor in vision}, folder / files.VISION)
        advance("vision tower")
        report = compile_engine(
            config.llm, max_seq_len, [capability], module_precision, launch_modes
        )
        kernels = {"components": module_precision.to_json(), "kernels": report}
        (folder / files.KERNELS).write_text(canonical_json(kernels), "utf-8")
        advance("kernels")
    read = empty_llm(config.llm, max_seq_len, lm_head=module_precision.lm_head).bytes_per_step
    return BuildResult(read, {name: version(name) for name in ("torch", "triton")})


def host_parts(config: VilaConfig, request: BuildRequest) -> tuple[str, ...]:
    """Return the modules left in the host's memory because the device has no room for them."""
    precision = "int4" if config.llm.quantization else "fp16"
    limit_bytes = memory_limit_bytes(request.target)
    return tuple(estimate_memory(config, request, precision, limit_bytes).in_host_memory)


def _save_llm(
    folder: Path,
    config: VilaConfig,
    shards: Iterator[Layer | PackedLlm],
) -> Prescales:
    """Write one file a shard, so that only one is in memory; return the norms' prescales."""
    (folder / files.LLM).mkdir()
    prescales: Prescales = {}
    for name, shard in zip(shard_names(config.llm.num_layers), shards, strict=True):
        contiguous = {key: tensor.contiguous() for key, tensor in tensors(shard).items()}
        save_file(contiguous, folder / files.LLM / files.shard_file(name))
        prescales[name] = norm_prescales(shard)
    return prescales
