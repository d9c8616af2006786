"""Memory of a native engine, and what it leaves in host memory where the GPU is too small."""

from __future__ import annotations

import math
from dataclasses import replace

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import tower_tensor_specs
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.memory import (
    GPU_PROGRAM_BYTES,
    Items,
    MemoryEstimate,
    MemoryRow,
    Storage,
    activation_item,
    cache_item,
    tower_activations,
    tower_bits,
    weight_items,
)
from vila_deploy.formats.base import TensorSpec
from vila_deploy.formats.module_dtypes import FP16, is_tower_linear
from vila_deploy.kernels.tile_config import TOKENS, WIDEST_GEMM
from vila_deploy.utils.estimates import MemoryItem, PlanStep

# Tokens that go through the decoder at a time.
PREFILL_TOKENS = 1024
# Our kernels keep every zero point as float16.
STORAGE = Storage(zero_bits=16, head_zero_bits=16)
# Modules that may stay in host memory, in the order of what that costs; keys of model.json.
EMBEDDINGS, VISION = "embeddings", "vision tower"
# Layers of a tower left there that are on the GPU at a time: one computes, one is being copied.
VISITING_LAYERS = 2


def estimate_memory(
    config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
) -> MemoryEstimate:
    """Return the memory on the GPU, after what doesn't fit was left in its host's memory."""
    llm, limits, modules = config.llm, request.limits, request.module_precision
    items: Items = {
        **weight_items(config, precision, STORAGE, modules),
        MemoryRow.KV_CACHE: cache_item(llm, limits, STORAGE, modules.kv_cache),
        MemoryRow.ACTIVATIONS: _activations(config, request, precision),
    }
    moved: dict[str, int] = {}
    # Jetson's GPU has no memory of its own.
    if request.target.reserved_bytes is None:
        items, moved = _offload(config, items, limit_bytes - GPU_PROGRAM_BYTES, modules.vision)
    return MemoryEstimate(items, in_host_memory=moved, run_notes=_notes(moved))


def _notes(moved: dict[str, int]) -> tuple[PlanStep, ...]:
    if not moved:
        return ()
    text = f"in host memory: {' and '.join(moved)}"
    if VISION in moved:
        text += f"; {moved[VISION] / 1e9:.1f} GB come to the GPU for each image"
    return (PlanStep(text, sum(moved.values())),)


def _activations(config: VilaConfig, request: BuildRequest, precision: str) -> MemoryItem:
    """Buffers of a chunk of the prompt and, for long ones, the widest weight in float16.

    Or those of the tower, with its widest matrix in float16 if it is kept in int8.
    """
    llm = config.llm
    tokens = min(PREFILL_TOKENS, request.limits.max_input_len)
    queries, keys = (n * llm.head_dim for n in (llm.num_heads, llm.num_kv_heads))
    # The residual in float32 twice, its norm, q, k, v and attention; gate and up, their product.
    count = tokens * (5 * llm.hidden_size + 3 * queries + 2 * keys + 5 * llm.intermediate_size)
    if precision == "int4" and tokens > WIDEST_GEMM:
        count += 2 * llm.intermediate_size * llm.hidden_size
    # Logits in float32, of each number of rows that a step may have.
    logits = 2 * llm.vocab_size * sum(row_counts(request.limits.max_batch_size))
    count += logits
    tower = tower_activations(config) + logits
    if request.module_precision.vision != FP16:
        tower += max(
            math.prod(tensor.shape)
            for tensor in tower_tensor_specs(config)
            if is_tower_linear(tensor.name, tensor.shape)
        )
    return activation_item(max(count, tower), STORAGE)


def row_counts(slots: int) -> list[int]:
    """Return the numbers of rows that steps over up to `slots` sequences have."""
    counts = [1]
    while counts[-1] < min(slots, TOKENS):
        counts.append(2 * counts[-1])
    return counts


def _offload(
    config: VilaConfig, items: Items, room_bytes: int, vision: str
) -> tuple[Items, dict[str, int]]:
    """Items after what doesn't fit into `room_bytes` was left in host memory, and its bytes."""
    layers, others = list[TensorSpec](), list[TensorSpec]()
    for tensor in tower_tensor_specs(config):
        (layers if "encoder.layers." in tensor.name else others).append(tensor)
    rest, inside = (tower_bits(part, vision, STORAGE) // 8 for part in (others, layers))
    visiting = VISITING_LAYERS * inside // max(1, config.vision_layers_used)
    ways = (
        (MemoryRow.EMBEDDINGS, EMBEDDINGS, 0, "in host memory"),
        (MemoryRow.VISION, VISION, rest + visiting, f"{VISITING_LAYERS} layers at a time"),
    )
    moved: dict[str, int] = {}
    for row, label, left, where in ways:
        if sum(item.bytes for item in items.values()) <= room_bytes:
            break
        item = items[row]
        if left < item.bytes:
            moved[label] = item.bytes
            items = {**items, row: replace(item, name=f"{item.name}, {where}", bytes=left)}
    return items, moved
