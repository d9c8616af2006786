"""Write the ONNX files of an engine for onnxruntime's CPU provider."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np

from vila_deploy.backends.onnxruntime import files
from vila_deploy.checkpoint import llm_config
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.formats.module_dtypes import INT8X2
from vila_deploy.onnx_export.arrays import float16
from vila_deploy.onnx_export.dialects.onnxruntime import INT8_TERMS, OnnxRuntimeDialect
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import StoredLlm, build_llm_graph, store_llm
from vila_deploy.onnx_export.vision import build_projector_graph, build_vision_graph
from vila_deploy.utils.progress import Advance, progress


def build(
    folder: Path,
    config: VilaConfig,
    llm: WeightSource,
    tower: WeightSource,
    projector: WeightSource,
    request: BuildRequest,
) -> BuildResult:
    """Write vision/, llm/ and the embedding table into `folder`, with memory for one layer.

    The LLM's linears are 4-bit where `llm` gives them so, float16 otherwise; the rest is float16.
    """
    steps = config.vision_layers_used + 1 + config.llm.num_layers + 2
    with progress(steps, "building") as advance:
        _save_vision(folder / files.VISION, config, tower, projector, advance)

        (folder / files.LLM).mkdir()
        with WeightFile(folder / files.LLM / files.WEIGHTS) as file:
            dialect = OnnxRuntimeDialect()
            stored = store_llm(
                config.llm,
                llm,
                request.limits.max_seq_len,
                file,
                dialect,
                advance,
                request.module_precision.lm_head,
            )
        _save_llm(folder / files.LLM, config.llm, stored, request.activations)

        table = float16(llm.tensor(llm_config.EMBEDDING), llm_config.EMBEDDING)
        np.save(folder / files.EMBEDDING, table)
        advance("embedding table")
    return BuildResult(
        stored.bytes_per_step, {name: version(name) for name in ("onnx", "onnxruntime")}
    )


def _save_vision(
    folder: Path,
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    advance: Advance,
) -> None:
    """One graph from pixels to embeddings; two where features of several scales are joined."""
    folder.mkdir()
    with WeightFile(folder / files.WEIGHTS) as file:
        whole = None if config.tiling.uses_s2 else projector
        build_vision_graph(config, tower, whole, file, advance).save(folder / files.GRAPH)
    if config.tiling.uses_s2:
        with WeightFile(folder / files.PROJECTOR_WEIGHTS) as file:
            graph = build_projector_graph(config, projector, file, advance)
        graph.save(folder / files.PROJECTOR_GRAPH)


def _save_llm(folder: Path, config: LlmConfig, stored: StoredLlm, activations: str | None) -> None:
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
