"""The ONNX graphs that TensorRT compiles, and the shapes that they are compiled for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vila_deploy.backends.tensorrt import files
from vila_deploy.backends.tensorrt.compile import Profile
from vila_deploy.builder.memory_plan import PREFILL_TOKENS
from vila_deploy.checkpoint import llm_config
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.engine.manifest import Limits
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.onnx_export.arrays import float16
from vila_deploy.onnx_export.dialects.tensorrt import TensorRtDialect, cache_names
from vila_deploy.onnx_export.dialects.tensorrt_10_3 import TensorRt10_3Dialect
from vila_deploy.onnx_export.dialects.tensorrt_10_15 import (
    DecomposableDialect,
    TensorRt10_15Dialect,
)
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import build_llm_graph, store_llm
from vila_deploy.onnx_export.vision import Style, build_projector_graph, build_vision_graph
from vila_deploy.utils.progress import Advance

DIALECTS: dict[str, type[TensorRtDialect]] = {
    "standard": TensorRt10_15Dialect,
    "primitive": TensorRt10_3Dialect,
}


def parts_of(config: VilaConfig) -> tuple[str, ...]:
    """Folders of the graphs of a model; features of several scales are joined between two."""
    if config.tiling.uses_s2:
        return files.VISION, files.PROJECTOR, files.LLM
    return files.VISION, files.LLM


def graph_steps(config: VilaConfig) -> int:
    """How often writing all of a model's graphs calls `advance`."""
    return config.vision_layers_used + 1 + config.llm.num_layers + 2


def write_vision(
    folder: Path,
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    dialect: str,
    advance: Advance,
    dtype: str = FP16,
) -> None:
    """vision/ and, where features of several scales are joined before it, projector/."""
    style = Style(DIALECTS[dialect].opset, half=True, int8=dtype != FP16)
    (folder / files.VISION).mkdir()
    with WeightFile(folder / files.VISION / files.WEIGHTS) as file:
        whole = None if config.tiling.uses_s2 else projector
        graph = build_vision_graph(config, tower, whole, file, advance, style)
    graph.save(folder / files.VISION / files.GRAPH)
    if config.tiling.uses_s2:
        (folder / files.PROJECTOR).mkdir()
        with WeightFile(folder / files.PROJECTOR / files.WEIGHTS) as file:
            graph = build_projector_graph(config, projector, file, advance, style)
        graph.save(folder / files.PROJECTOR / files.GRAPH)


def write_llm(
    folder: Path,
    config: VilaConfig,
    llm: WeightSource,
    max_seq_len: int,
    dialect: str,
    advance: Advance,
    head: str = FP16,
    *,
    decomposable: bool = False,
) -> int:
    """llm/ and the embedding table; bytes of weights that a decoding step reads.

    Args:
        decomposable: for a compiler that must be told that attention need not be one kernel; only
            TensorRT reads such a graph.
    """
    (folder / files.LLM).mkdir()
    kind = DIALECTS[dialect]
    emitter = (DecomposableDialect if decomposable and kind is TensorRt10_15Dialect else kind)()
    with WeightFile(folder / files.LLM / files.WEIGHTS) as file:
        stored = store_llm(config.llm, llm, max_seq_len, file, emitter, advance, head)
    graph = build_llm_graph(config.llm, stored, emitter, tokens=None, logits=True)
    graph.save(folder / files.LLM / files.GRAPH)
    name = llm_config.EMBEDDING
    np.save(folder / files.EMBEDDING, float16(llm.tensor(name), name))
    advance("embedding table")
    return stored.bytes_per_step


def profiles(
    config: VilaConfig, limits: Limits, one_for_all: bool
) -> dict[str, tuple[Profile, ...]]:
    """Shapes of each part's inputs: the LLM decodes in its first profile, prefills in its last.

    A prompt goes through the LLM in chunks, so that memory does not grow with --max-input-len.

    Args:
        one_for_all: decode and prefill share a profile, for compilers that make the kernels for
            a shape where they run; two would only double the time and the plan.
    """
    llm, size, batch = config.llm, config.vision.image_size, limits.max_batch_size
    chunk = min(PREFILL_TOKENS, limits.max_input_len)
    cache = (llm.num_kv_heads, limits.max_seq_len, llm.head_dim)
    past = {f"past_{n}": cache for layer in range(llm.num_layers) for n in cache_names(layer)}

    def steps(least: int, largest: int) -> Profile:
        shapes = {
            "inputs_embeds": (lambda b, t: (b, t, llm.hidden_size)),
            "positions": (lambda b, t: (b, t)),
            "last": (lambda b, t: (b,)),
        }
        every: Profile = {
            name: (shape(1, least), shape(1, largest), shape(batch, largest))
            for name, shape in shapes.items()
        }
        every |= {name: ((1, *dims), (1, *dims), (batch, *dims)) for name, dims in past.items()}
        return every

    def tiles(name: str, most: int, *dims: int) -> Profile:
        return {name: ((1, *dims), (1, *dims), (most, *dims))}

    side, tiling = config.feature_side, config.tiling
    made: dict[str, tuple[Profile, ...]] = {
        files.VISION: (tiles("pixels", 1, 3, size, size),),
        files.LLM: (steps(1, chunk),) if one_for_all else (steps(1, 1), steps(1, chunk)),
    }
    if tiling.uses_s2:
        made[files.PROJECTOR] = (tiles("features", 1, side**2, config.feature_channels),)
    return made
