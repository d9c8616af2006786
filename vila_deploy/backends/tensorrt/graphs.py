"""Write the ONNX graphs that TensorRT compiles, and the shapes to compile them for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vila_deploy.backends.tensorrt import files
from vila_deploy.backends.tensorrt.compile import Profile
from vila_deploy.backends.tensorrt.decoder import PREFILL_TOKENS
from vila_deploy.checkpoint import llm_config
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.engine.manifest import Limits
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.onnx_export.arrays import float16
from vila_deploy.onnx_export.dialects.base import cache_names
from vila_deploy.onnx_export.dialects.registry import TENSORRT_DIALECTS
from vila_deploy.onnx_export.dialects.tensorrt_10_15 import TensorRt10_15Dialect
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import build_llm_graph, store_llm
from vila_deploy.onnx_export.vision import (
    VisionGraphOptions,
    build_projector_graph,
    build_vision_graph,
)
from vila_deploy.utils.progress import Advance


def modules_of(config: VilaConfig) -> tuple[str, ...]:
    """Return the folders of a model's graphs; S2 features are made between vision and projector."""
    if config.tiling.uses_s2:
        return files.VISION, files.PROJECTOR, files.LLM
    return files.VISION, files.LLM


def graph_steps(config: VilaConfig) -> int:
    """Return how often writing all of a model's graphs calls `advance`."""
    return config.vision_layers_used + 1 + config.llm.num_layers + 2


def write_vision(
    folder: Path,
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    dialect: str,
    advance: Advance,
    dtype: str = FP16,
    max_matrix_bytes: int | None = None,
) -> None:
    """Write vision/ and, for models with S2 features, projector/ into `folder`.

    Args:
        max_matrix_bytes: larger matrices are cut into pieces; None leaves them whole.
    """
    opset = TENSORRT_DIALECTS[dialect].opset
    options = VisionGraphOptions(opset, True, dtype != FP16, max_matrix_bytes)
    (folder / files.VISION).mkdir()
    with WeightFile(folder / files.VISION / files.WEIGHTS) as file:
        included = None if config.tiling.uses_s2 else projector
        graph = build_vision_graph(config, tower, included, file, advance, options)
    graph.save(folder / files.VISION / files.GRAPH)
    if config.tiling.uses_s2:
        (folder / files.PROJECTOR).mkdir()
        with WeightFile(folder / files.PROJECTOR / files.WEIGHTS) as file:
            graph = build_projector_graph(config, projector, file, advance, options)
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
    max_matrix_bytes: int | None = None,
) -> int:
    """Write llm/ and the embedding table; return the bytes of weights that a step reads.

    Args:
        decomposable: see TensorRt10_15Dialect; for compilation by `tensorrt`, on the device.
        max_matrix_bytes: larger matrices are cut into pieces; None leaves them whole.
    """
    (folder / files.LLM).mkdir()
    emitter = TENSORRT_DIALECTS[dialect](max_matrix_bytes=max_matrix_bytes)
    if decomposable and isinstance(emitter, TensorRt10_15Dialect):
        emitter = TensorRt10_15Dialect(decomposable=True, max_matrix_bytes=max_matrix_bytes)
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
    """Return the shapes of each graph's inputs.

    The LLM decodes in its first profile and prefills in its last. A prompt goes through the LLM in
    chunks, so that memory does not grow with --max-input-len.

    Args:
        one_for_all: decode and prefill share a profile. tensorrt-rtx makes kernels for a shape
            where it runs, so a second profile would only double compile time and plan size.
    """
    llm, size, batch = config.llm, config.vision.image_size, limits.max_batch_size
    chunk = min(PREFILL_TOKENS, limits.max_input_len)
    cache = (llm.num_kv_heads, limits.max_seq_len, llm.head_dim)
    past = {f"past_{n}": cache for layer in range(llm.num_layers) for n in cache_names(layer)}

    def llm_shapes(smallest: int, largest: int) -> Profile:
        shapes = {
            "inputs_embeds": (lambda b, t: (b, t, llm.hidden_size)),
            "positions": (lambda b, t: (b, t)),
            "last": (lambda b, t: (b,)),
        }
        profile: Profile = {
            name: (shape(1, smallest), shape(1, largest), shape(batch, largest))
            for name, shape in shapes.items()
        }
        profile |= {name: ((1, *dims), (1, *dims), (batch, *dims)) for name, dims in past.items()}
        return profile

    def tile_shapes(name: str, largest_count: int, *dims: int) -> Profile:
        return {name: ((1, *dims), (1, *dims), (largest_count, *dims))}

    side, tiling = config.feature_side, config.tiling
    by_graph: dict[str, tuple[Profile, ...]] = {
        files.VISION: (tile_shapes("pixels", 1, 3, size, size),),
        files.LLM: (llm_shapes(1, chunk),)
        if one_for_all
        else (llm_shapes(1, 1), llm_shapes(1, chunk)),
    }
    if tiling.uses_s2:
        by_graph[files.PROJECTOR] = (tile_shapes("features", 1, side**2, config.feature_channels),)
    return by_graph
