"""Write the files of an engine for the native backend; no GPU is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file

from vila_deploy.backends.native import files, require_triton
from vila_deploy.backends.native.compile import compile_engine
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
from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.engine.build_request import BuildRequest, Built
from vila_deploy.engine.target import Target
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch_mode import DEFAULT_LAUNCH_MODE, get_launch_mode
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.progress import progress

MAX_BATCH_SIZE = 1
GROUP_SIZES = (16, 32, 64, 128, 256)
# Query heads that share a key head fill at most one tensor core product.
MOST_HEADS_IN_GROUP = 16


def check(config: VilaConfig, request: BuildRequest) -> None:
    """Raise VilaDeployError if this backend can't build the model; before any work."""
    llm = config.llm
    get_launch_mode(_kernel_launch(request)).check(_capability(request.target))
    if request.gpus > 1:
        raise VilaDeployError(
            "backend native runs on one GPU, --tp and --pp are for several",
            fix="leave them out, or use --backend tensorrt-llm",
        )
    if llm.quantization is not None and llm.quantization.group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"backend native takes group sizes {', '.join(map(str, GROUP_SIZES))}, found "
            f"{llm.quantization.group_size}",
            where="llm/config.json: quantization_config.group_size",
            fix="quantize again with --group-size 128",
        )
    if llm.num_heads // llm.num_kv_heads > MOST_HEADS_IN_GROUP:
        raise VilaDeployError(
            f"backend native takes up to {MOST_HEADS_IN_GROUP} query heads for a key head, found "
            f"{llm.num_heads // llm.num_kv_heads}",
            where="llm/config.json: num_key_value_heads",
            fix="use another backend",
        )


def check_tools(request: BuildRequest) -> None:
    """Raise VilaDeployError if triton is missing."""
    require_triton()


def build(
    folder: Path,
    config: VilaConfig,
    llm: WeightSource,
    tower: WeightSource,
    projector: WeightSource,
    request: BuildRequest,
) -> Built:
    """Write packed weights, tower and sizes into `folder`, and what the compiler says.

    Every kernel is compiled for the target. One decoder layer is in memory at a time.
    """
    check(config, request)
    max_seq_len, kernel_launch = request.limits.max_seq_len, _kernel_launch(request)
    capability, launch_mode = _capability(request.target), get_launch_mode(kernel_launch)
    module_precision, in_host_memory = request.module_precision, host_parts(config, request)
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
            config.llm, max_seq_len, [capability], module_precision, launch_mode
        )
        kernels = {"components": module_precision.to_json(), "kernels": report}
        (folder / files.KERNELS).write_text(canonical_json(kernels), "utf-8")
        advance("kernels")
    read = empty_llm(config.llm, max_seq_len, lm_head=module_precision.lm_head).bytes_per_step
    return Built(read, {name: version(name) for name in ("torch", "triton")})


def host_parts(config: VilaConfig, request: BuildRequest) -> tuple[str, ...]:
    """Return the rows of the plan that stay in host memory because the device lacks room."""
    precision = "int4" if config.llm.quantization else "fp16"
    plan = plan_engine(
        config, request.target, "native", precision, request.limits, request.module_precision
    )
    return plan.in_host_memory


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


def _kernel_launch(request: BuildRequest) -> str:
    return request.kernel_launch or DEFAULT_LAUNCH_MODE


def _capability(target: Target) -> ComputeCapability:
    assert target.compute_capability is not None
    return ComputeCapability.parse(target.compute_capability)
