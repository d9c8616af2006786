"""Memory of an engine for llama.cpp, from the configs alone.

Weights and caches as llama.cpp's log gives them; its scratch buffer by a formula that was fitted to
that log (tests/llamacpp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from vila_deploy.backends.onnxruntime.memory import STORAGE as ONNX_STORAGE
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.gguf_layout import tensor_specs
from vila_deploy.checkpoint.llm_config import EMBEDDING, LlmConfig
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.memory import (
    GPU_PROGRAM_BYTES,
    Items,
    MemoryEstimate,
    MemoryRow,
    tower_activations,
    weight_items,
)
from vila_deploy.engine.target import Target
from vila_deploy.formats.gguf import dtype, layer_types_of
from vila_deploy.formats.gguf_file import TENSOR_TYPES, tensor_bytes
from vila_deploy.formats.module_dtypes import FP16, INT8
from vila_deploy.utils.estimates import MemoryItem, PlanStep

# Tokens that go through the decoder at a time.
PREFILL_TOKENS = 256
# Rows of a pass whose logits can be read, at least one for each slot.
OUTPUT_ROWS = 64
# llama.cpp's caches have a multiple of this many positions.
CACHE_STEP = 256
BLOCK = TENSOR_TYPES["Q8_0"].block
HEAD_TYPES = {INT8: "Q8_0"}
CACHE_TYPES = {FP16: "F16", INT8: "Q8_0"}
# Python with onnxruntime and llama.cpp.
PROGRAM_BYTES = 230 << 20
# Rows that stay in the memory of the host of a GPU, and those that are spread over the layers.
ON_HOST = (MemoryRow.EMBEDDINGS, MemoryRow.VISION, MemoryRow.PROJECTOR)
IN_LAYERS = (MemoryRow.DECODER_LINEARS, MemoryRow.NORMS, MemoryRow.KV_CACHE)


def linear_type(config: LlmConfig, target: Target, precision: str) -> str:
    """Return the type in which the decoder's linears are stored.

    Zero points are exact in Q5_0, and a prompt takes 0.6 of Q4_1's time on a processor. On a GPU
    the fewer bytes of Q4_1 count.
    """
    if precision == FP16:
        return "F16"
    zero_point = config.quantization is None or config.quantization.zero_point
    return "Q5_0" if zero_point and gpu_kind(target) is None else dtype(zero_point)


def bits(kind: str) -> float:
    """Return the bits of a value in a tensor type."""
    row = TENSOR_TYPES[kind]
    return 8 * row.block_bytes / row.block


def padded_length(max_seq_len: int) -> int:
    """Return the positions that the cache of one slot has."""
    return -(-max_seq_len // CACHE_STEP) * CACHE_STEP


def gpu_kind(target: Target) -> str | None:
    """Return ggml's name of the GPUs of a target; None for a processor."""
    return target.ggml_backend or ("CUDA" if target.compute_capability else None)


def bytes_per_step(config: LlmConfig, kind: str, head: str) -> int:
    """Return the bytes of weights that a decoding step reads: all but the embedding table.

    Args:
        kind: the type of the decoder's linears.
        head: a key of HEAD_TYPES, or FP16.
    """
    heads = (HEAD_TYPES.get(head, "F16"),)
    types_of = layer_types_of(config.quantization.scheme) if config.quantization else {}
    specs = tensor_specs(config, ("F16",), (kind,), heads, types_of)
    return sum(
        tensor_bytes(spec.shape, spec.types[0]) for spec in specs if spec.source != EMBEDDING
    )


class DecoderShape(NamedTuple):
    """What caches and scratch buffer depend on."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


def shape_of(config: LlmConfig) -> DecoderShape:
    """Return the shape of a model from its config."""
    return DecoderShape(*(getattr(config, name) for name in DecoderShape._fields))


def shape_in_file(metadata: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a model from the metadata of its GGUF file."""
    family = metadata["general.architecture"]
    keys = (
        "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.key_length", "vocab_size",
    )  # fmt: skip
    return DecoderShape(*(metadata[f"{family}.{key}"] for key in keys))


def cache_bytes(shape: DecoderShape, max_seq_len: int, dtype: str) -> int:
    """Return the bytes of keys and values of one layer and slot."""
    values = 2 * shape.num_kv_heads * shape.head_dim * padded_length(max_seq_len)
    return int(values * bits(CACHE_TYPES[dtype]) / 8)


def scratch_bytes(shape: DecoderShape, max_seq_len: int) -> int:
    """Return the bytes of llama.cpp's scratch buffer, with the attention that takes more.

    Fitted to its log: what lives at once in a pass of PREFILL_TOKENS tokens within the attention,
    within the gated product, and within the head.
    """
    positions, hidden = padded_length(max_seq_len), shape.hidden_size
    queries, keys = (heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads))
    attention = positions * (shape.num_heads + 1) + 4 * queries + hidden + 2 * keys
    gated = 3 * shape.intermediate_size + 4 * hidden + positions // 2
    head = OUTPUT_ROWS * (shape.vocab_size + hidden)
    return 4 * max(PREFILL_TOKENS * attention, PREFILL_TOKENS * gated, head)


def estimate_memory(
    config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
) -> MemoryEstimate:
    """Return the memory on the GPU; on the computer where the GPU has none of its own.

    A GPU with memory of its own holds the head and as many of the last layers as fit.
    """
    items = _items(config, request, precision)
    if not _has_own_memory(request.target):
        return MemoryEstimate(items, PROGRAM_BYTES)
    moved = {items[row].name: items.pop(row).bytes for row in ON_HOST}
    room = limit_bytes - GPU_PROGRAM_BYTES - items[MemoryRow.ACTIVATIONS].bytes
    layers = config.llm.num_layers
    count = request.gpu_layers
    if count is None:
        count = _layers_that_fit(items, layers, room)
    if count <= layers:
        in_layers = max(0, count - 1)
        for row in IN_LAYERS:
            whole = items[row]
            kept = whole.bytes * in_layers // layers
            name = f"{whole.name}, {in_layers} of {layers} layers"
            items[row] = replace(whole, name=name, bytes=kept)
            moved[whole.name] = whole.bytes - kept
    if not count:
        head = items.pop(MemoryRow.HEAD)
        moved[head.name] = head.bytes
    note = PlanStep("in host memory", PROGRAM_BYTES + sum(moved.values()))
    return MemoryEstimate(items, in_host_memory=moved, run_notes=(note,))


def _items(
    config: VilaConfig, request: BuildRequest, precision: str
) -> dict[MemoryRow, MemoryItem]:
    """Return all rows: vision as backend onnxruntime has it, the language model as llama.cpp."""
    llm, limits, modules = config.llm, request.limits, request.module_precision
    items = weight_items(config, precision, ONNX_STORAGE, modules)
    stored_bits = {
        MemoryRow.DECODER_LINEARS: _linear_bits(llm, linear_type(llm, request.target, precision)),
        MemoryRow.HEAD: bits(HEAD_TYPES.get(modules.lm_head, "F16")),
        MemoryRow.NORMS: bits("F32"),
    }
    for row, stored in stored_bits.items():
        items[row] = MemoryItem.of(row.value, items[row].parameters, stored)
    shape, slots = shape_of(llm), limits.max_batch_size
    cache = slots * llm.num_layers * cache_bytes(shape, limits.max_seq_len, modules.kv_cache)
    name = f"{MemoryRow.KV_CACHE.value} of {limits.max_seq_len} tokens"
    positions = slots * padded_length(limits.max_seq_len)
    values = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * positions
    items[MemoryRow.KV_CACHE] = MemoryItem(name, values, 8 * cache / values, cache)
    scratch = scratch_bytes(shape, limits.max_seq_len)
    scratch += 4 * llm.vocab_size * slots + 4 * tower_activations(config)
    items[MemoryRow.ACTIVATIONS] = MemoryItem.of(MemoryRow.ACTIVATIONS.value, scratch // 4, 32)
    return items


def _linear_bits(config: LlmConfig, kind: str) -> float:
    """Return the mean bits of a value of the layers' linears, most of which are of type `kind`."""
    types = layer_types_of(config.quantization.scheme) if config.quantization else {}
    if not types:
        return bits(kind)
    sizes, total = 0, 0.0
    for index in range(config.num_layers):
        for name, shape in config.layer_linears(index).items():
            sizes += math.prod(shape)
            total += math.prod(shape) * bits(types.get(name, (kind,))[0])
    return total / sizes


def _has_own_memory(target: Target) -> bool:
    """Return whether the target is a GPU whose memory isn't the host's; Jetson's is."""
    return target.reserved_bytes is None and gpu_kind(target) in ("CUDA", "Vulkan")


def _layers_that_fit(items: Items, layers: int, room_bytes: int) -> int:
    """Return how many layers fit into a GPU's memory, the head counted as one."""
    each = sum(items[row].bytes for row in IN_LAYERS) // layers
    return max(0, min(layers + 1, 1 + (room_bytes - items[MemoryRow.HEAD].bytes) // each))
