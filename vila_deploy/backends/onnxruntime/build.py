"""Write the ONNX files of an engine for onnxruntime's CPU provider."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.cache_scales import calibrate_cache
from vila_deploy.backends.onnxruntime.memory import PROGRAM_BYTES
from vila_deploy.backends.onnxruntime.vision import (
    FEATURE_ERROR_BOUND,
    cpu_options,
    write_graphs,
    write_vision,
)
from vila_deploy.checkpoint import llm_config
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.precision import DefaultChoice
from vila_deploy.formats.module_dtypes import FP16, INT8X2
from vila_deploy.onnx_export.arrays import float16
from vila_deploy.onnx_export.dialects.base import CacheScales
from vila_deploy.onnx_export.dialects.onnxruntime import INT8_TERMS, OnnxRuntimeDialect
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import StoredLlm, build_llm_graph, store_llm
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes
from vila_deploy.utils.progress import Advance, progress


def build(
    folder: Path,
    config: VilaConfig,
    weights: ModelWeights,
    request: BuildRequest,
) -> BuildResult:
    """Write vision/, llm/ and the embedding table into `folder`.

    The LLM's linears are 4-bit where the weights are so, float16 otherwise. It takes the memory of
    one layer; for an int8 tower or cache, that of running the tower or the LLM.

    Raises:
        VilaDeployError: an int8 cache is asked for, and there is no memory to calibrate it.
    """
    steps = config.vision_layers_used + 1 + config.llm.num_layers + 2
    with progress(steps, "building") as advance:
        chosen = write_chosen_vision(folder, config, weights, request, advance)

        (folder / files.LLM).mkdir()
        with WeightFile(folder / files.LLM / files.WEIGHTS) as file:
            dialect = OnnxRuntimeDialect()
            stored = store_llm(
                config.llm,
                weights.llm,
                request.limits.max_seq_len,
                file,
                dialect,
                advance,
                request.module_precision.lm_head,
            )
        scales, of_cache = _calibrate_cache(folder / files.LLM, config.llm, stored, request)
        stored = replace(stored, cache_scales=scales)
        _save_llm(folder / files.LLM, config.llm, stored, request.activations)

        table = float16(weights.llm.tensor(llm_config.EMBEDDING), llm_config.EMBEDDING)
        np.save(folder / files.EMBEDDING, table)
        advance("embedding table")
    versions = {name: version(name) for name in ("onnx", "onnxruntime")}
    return BuildResult(stored.bytes_per_step, versions, chosen={**chosen, **of_cache})


def write_chosen_vision(
    folder: Path,
    config: VilaConfig,
    weights: ModelWeights,
    request: BuildRequest,
    advance: Advance,
) -> dict[str, DefaultChoice]:
    """Write vision/ and return its dtype with the reason, where the choice was left open."""
    dtype, (_, tower, projector) = request.module_precision.vision, weights
    if request.random_weights:
        options = cpu_options(dtype)
        write_graphs(folder / files.VISION, config, tower, projector, options, advance)
    else:
        error = write_vision(folder, config, tower, projector, dtype, advance)
    if "vision" not in request.defaults or dtype == FP16:
        return {}
    if request.random_weights:
        reason = "the error of random weights means nothing and was not measured"
        return {"vision": DefaultChoice(dtype, reason)}
    if error is not None and error <= FEATURE_ERROR_BOUND:
        reason = f"changes features by {error:.1%}, and up to {FEATURE_ERROR_BOUND:.0%} is taken"
        return {"vision": DefaultChoice(dtype, reason)}
    shutil.rmtree(folder / files.VISION)
    write_vision(folder, config, tower, projector, FP16, lambda *_: None)
    reason = (
        "int8 could not be checked: too little memory to run the tower in float32"
        if error is None
        else f"int8 would change features by {error:.1%}, more than {FEATURE_ERROR_BOUND:.0%}"
    )
    return {"vision": DefaultChoice(FP16, reason)}


def _calibrate_cache(
    folder: Path, config: LlmConfig, stored: StoredLlm, request: BuildRequest
) -> tuple[tuple[CacheScales, ...], dict[str, DefaultChoice]]:
    """Return the scales of the cache, none for float32, and its dtype where that has changed."""
    if request.module_precision.kv_cache == FP16:
        return (), {}
    assert request.prompts is not None
    needed = stored.bytes_per_step + PROGRAM_BYTES
    if available_memory_bytes() < needed:
        reason = f"calibrating an int8 cache needs {needed / 1e9:.1f} GB of memory"
        if "kv_cache" in request.defaults:
            return (), {"kv_cache": DefaultChoice(FP16, reason)}
        raise VilaDeployError(reason, where="--kv-cache int8", fix="build it with --kv-cache fp16")
    dialect = OnnxRuntimeDialect(int8_terms=INT8_TERMS[request.activations])
    return calibrate_cache(folder, config, stored, dialect, request.prompts()), {}


def _save_llm(
    folder: Path,
    config: LlmConfig,
    stored: StoredLlm,
    activations: str | None,
) -> None:
    """One graph for any number of tokens; with activations int8x2, a second one for many tokens.

    Both read the same weights, each through the kernel that is fastest for it. onnxruntime repacks
    the weights for each kernel, so that one graph takes half the memory of two.
    """
    dialect = OnnxRuntimeDialect(int8_terms=INT8_TERMS[activations])
    if activations != INT8X2:
        early = activations is not None
        graph = build_llm_graph(config, stored, dialect, tokens=None, logits=True, last_early=early)
        graph.save(folder / files.GRAPH)
        return
    graph = build_llm_graph(config, stored, dialect, tokens=1, logits=True)
    graph.save(folder / files.GRAPH)
    graph = build_llm_graph(config, stored, OnnxRuntimeDialect(), tokens=None, logits=False)
    graph.save(folder / files.PREFILL_GRAPH)
