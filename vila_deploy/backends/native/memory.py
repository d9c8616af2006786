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

# Tokens that go through the decoder at a time, padded to one of the lengths: at most half more
# from 48 tokens on. Below, a product costs the same for fewer. A lone token has products of its
# own, as `chunk_size` knows.
PREFILL_TOKENS = 1024
PROMPT_LENGTHS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, PREFILL_TOKENS)
# Of a kernel in a CUDA graph, on the GPU: assumed. Kernels of a layer in a prompt's graph.
GRAPH_KERNEL_BYTES, PROMPT_KERNELS = 16 << 10, 13
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
    """Buffers and graphs of prompts and steps, and what the tower holds while it computes.

    For long prompts the widest weight in float16 is among them, and so is the tower's widest matrix
    if it is kept in int8.
    """
    count = _prompt_values(config, request, precision) + tower_activations(config)
    # Logits in float32, of each number of rows that a step may have.
    count += 2 * config.llm.vocab_size * sum(row_counts(request.limits.max_batch_size))
    if request.module_precision.vision != FP16:
        count += max(
            math.prod(tensor.shape)
            for tensor in tower_tensor_specs(config)
            if is_tower_linear(tensor.name, tensor.shape)
        )
    return activation_item(count, STORAGE)


def _prompt_values(config: VilaConfig, request: BuildRequest, precision: str) -> int:
    """Return the values, 2 bytes each, of the buffers of a piece of a prompt and of its graphs."""
    llm = config.llm
    lengths = prompt_lengths(request.limits.max_seq_len)
    tokens = lengths[-1]
    queries, keys = (n * llm.head_dim for n in (llm.num_heads, llm.num_kv_heads))
    # Residual and what is added to it in float32, the norm; q, k and v, rotated q and attention;
    # gate and up, their product.
    count = tokens * (5 * llm.hidden_size + 3 * queries + 2 * keys + 3 * llm.intermediate_size)
    if precision == "int4" and tokens > WIDEST_GEMM:
        count += 2 * llm.intermediate_size * llm.hidden_size
    graphs = len(lengths) * PROMPT_KERNELS * llm.num_layers * GRAPH_KERNEL_BYTES
    return count + graphs // 2


def prompt_lengths(max_seq_len: int) -> list[int]:
    """Return the numbers of tokens that pieces of prompts are padded to, the longest last."""
    longest = min(max_seq_len, PREFILL_TOKENS)
    end = next(index for index, tokens in enumerate(PROMPT_LENGTHS) if tokens >= longest)
    return list(PROMPT_LENGTHS[: end + 1])


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
