"""Write the inputs of TensorRT-LLM's builder, anywhere; build its engines, on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.build_md import instructions
from vila_deploy.backends.tensorrt_llm.device import (
    check_capability,
    find_builder,
    run_builder,
)
from vila_deploy.backends.tensorrt_llm.releases import (
    DESKTOP,
    JETSON,
    Release,
    build_command,
    check_version,
    release_for,
)
from vila_deploy.backends.tensorrt_llm.vision import compile_vision, write_vision
from vila_deploy.checkpoint import llm_config
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.trtllm_sharding import Parallel, rank_tensors
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import Manifest, PendingStep
from vila_deploy.engine.target import get_target
from vila_deploy.formats import trtllm
from vila_deploy.onnx_export.arrays import float16
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields
from vila_deploy.utils.progress import progress
from vila_deploy.writers.trtllm import write_trtllm

VISION_STEP = PendingStep("vision", "compile the vision encoder with TensorRT")
LLM_STEP = PendingStep("llm", "build the LLM with trtllm-build")
PACKAGES = ("tensorrt_llm", "tensorrt-llm")


def build(
    folder: Path,
    config: VilaConfig,
    weights: ModelWeights,
    request: BuildRequest,
) -> BuildResult:
    """Write vision/, llm_checkpoint/, the embedding table and instructions for the device.

    Memory for one layer; engines come from `finish_step`.
    """
    release = release_for(request.target.compute_capability, request.target.name)
    with progress(config.vision_layers_used + 2, "writing the vision encoder") as advance:
        write_vision(folder, config, weights.tower, weights.projector, release, advance)
        name = llm_config.EMBEDDING
        np.save(folder / files.EMBEDDING, float16(weights.llm.tensor(name), name))
        advance("embedding table")
    (folder / files.CHECKPOINT).mkdir()
    parallel = Parallel(request.tp, request.pp)
    write_trtllm(config.llm, weights.llm, folder / files.CHECKPOINT, parallel)
    precision = "fp16" if config.llm.quantization is None else "int4"
    text = instructions(release, request, precision, config.vision.image_size)
    (folder / files.INSTRUCTIONS).write_text(text, "utf-8")
    return BuildResult(
        _bytes_per_step(config, parallel), {"onnx": version("onnx")}, (VISION_STEP, LLM_STEP)
    )


def _bytes_per_step(config: VilaConfig, parallel: Parallel) -> int:
    """Bytes of all ranks; trtllm-build makes scales float16, embeddings are looked up by row."""
    quantization = config.llm.quantization
    group_size = None if quantization is None else quantization.group_size
    total = 0
    for rank in range(parallel.ranks):
        for name, shape, dtypes in rank_tensors(config.llm, group_size, parallel, rank):
            if not name.startswith(trtllm.EMBEDDING.name):
                total += math.prod(shape) * (1 if dtypes == ("I8",) else 2)
    return total


def artifacts(step: PendingStep) -> tuple[str, ...]:
    """Return the paths in the folder that a step makes, in whole or in part."""
    if step.id == LLM_STEP.id:
        return files.LLM, f"{files.LLM}.partial"
    names = (JETSON.vision_engine, DESKTOP.vision_engine)
    return tuple(f"{files.VISION}/{name}{end}" for name in names for end in ("", ".partial"))


def intermediates(folder: Path, step: PendingStep) -> tuple[str, ...]:
    """Return the files in `folder` that nothing needs once `step` is done.

    The LLM's checkpoint is as large as its engines, and BUILD.md is about the way to them.
    """
    if step.id == LLM_STEP.id:
        names = sorted(path.name for path in (folder / files.CHECKPOINT).iterdir())
        return (*(f"{files.CHECKPOINT}/{name}" for name in names), files.INSTRUCTIONS)
    return tuple(f"{files.VISION}/{name}" for name in (files.GRAPH, files.WEIGHTS))


def check_device(folder: Path, manifest: Manifest) -> None:
    """Raise VilaDeployError, with what to install, if the engines can't be built here."""
    release = _release(manifest)
    find_builder(release)
    installed = _installed()
    if installed is not None:
        check_version(release, installed)
    target = get_target(manifest.target)
    assert target.compute_capability is not None
    check_capability(target.compute_capability, target.title)


def finish_step(folder: Path, manifest: Manifest, step: PendingStep) -> Mapping[str, str]:
    """Make the vision engine or the LLM's engines; return the versions of the tools that did.

    Raises:
        VilaDeployError: what the tool says, in one line.
    """
    release, folder = _release(manifest), folder.resolve()
    if step.id == VISION_STEP.id:
        size = manifest.model.image.size
        return {"tensorrt": compile_vision(folder, release.vision_engine, size)}
    parallel = parallel_of(folder)
    request = BuildRequest(get_target(manifest.target), manifest.limits, parallel.tp, parallel.pp)
    command = build_command(release, request, manifest.precision, folder)
    partial = folder / f"{files.LLM}.partial"
    arguments = [
        f"--output_dir={partial}" if word.startswith("--output_dir=") else word
        for word in command[1:]
    ]
    run_builder([find_builder(release), *arguments])
    missing = [
        name
        for name in (files.CONFIG, *map(files.engine_file, range(request.gpus)))
        if not (partial / name).is_file()
    ]
    if missing:
        raise VilaDeployError(
            f"trtllm-build ended without writing {missing[0]}",
            where=folder,
            fix="run it by hand, as BUILD.md there says, to see why",
        )
    partial.rename(folder / files.LLM)
    return {"tensorrt_llm": _installed() or "unknown"}


def parallel_of(folder: Path) -> Parallel:
    """Return how the checkpoint in an engine folder is cut."""
    mapping = Fields.from_file(folder / files.CHECKPOINT / files.CONFIG).child("mapping")
    return Parallel(*(mapping.integer(key, 1, high=1024) for key in ("tp_size", "pp_size")))


def _release(manifest: Manifest) -> Release:
    target = get_target(manifest.target)
    return release_for(target.compute_capability, target.name)


def _installed() -> str | None:
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
