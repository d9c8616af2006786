"""Calibrate the scales of an int8 key/value cache: one for each channel of each head and layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.inference import load_graph
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.onnx_export.dialects.base import CacheScales
from vila_deploy.onnx_export.dialects.onnxruntime import OnnxRuntimeDialect
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import StoredLlm, build_llm_graph
from vila_deploy.utils.arrays import Floats

LARGEST = 127
# Room for values that no calibration sequence reaches.
MARGIN = 1.1
# Of a channel that is always zero.
LEAST_SCALE = 1e-6


def calibrate_cache(
    folder: Path,
    config: LlmConfig,
    stored: StoredLlm,
    dialect: OnnxRuntimeDialect,
    prompts: Sequence[Floats],
) -> tuple[CacheScales, ...]:
    """Run `prompts` with a float32 cache and write the scales into `folder`, beside the weights.

    A scale is the largest magnitude of its channel over all prompts, keys after their rotation,
    with MARGIN, over 127.

    Args:
        prompts: embeddings [tokens, hidden] of sequences, at most stored.cos.shape[0] tokens each.
    """
    extents = _extents(folder, config, stored, dialect, prompts)
    scales = [np.maximum(extent * MARGIN / LARGEST, LEAST_SCALE) for extent in extents]
    with WeightFile(folder / files.CACHE_SCALES) as file:
        names = [file.append(scale.astype(np.float32)) for scale in scales]
    return tuple(zip(names[::2], names[1::2], strict=True))


def _extents(
    folder: Path,
    config: LlmConfig,
    stored: StoredLlm,
    dialect: OnnxRuntimeDialect,
    prompts: Sequence[Floats],
) -> list[Floats]:
    """Return the largest magnitude [1, kv_heads, 1, head_dim] of each key and value cache."""
    path = folder / files.SCRATCH_GRAPH
    build_llm_graph(config, stored, dialect, tokens=None, logits=False).save(path)
    session = load_graph(path)
    outputs = [output.name for output in session.get_outputs()]
    shape = (config.num_kv_heads, config.head_dim)
    extents: list[Floats] = [np.zeros(shape, np.float32) for _ in outputs]
    for prompt in prompts:
        embeds = np.ascontiguousarray(prompt[: stored.cos.shape[0]], np.float32)[None]
        count = embeds.shape[1]
        cache = np.zeros((1, config.num_kv_heads, count, config.head_dim), np.float32)
        feeds = {
            "inputs_embeds": embeds,
            "seqlens_k": np.array([count - 1], np.int32),
            "total_sequence_length": np.array(count, np.int32),
        }
        feeds |= {name.replace("present_", "past_"): cache for name in outputs}
        for extent, values in zip(extents, session.run(outputs, feeds), strict=True):
            np.maximum(extent, np.abs(values[0]).max(1), out=extent)
    path.unlink()
    return [extent[None, :, None] for extent in extents]
