"""Memory of an engine on its device, from the configs alone: what every backend's model shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.tensor_schema import (
    TensorSpec,
    parameters,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import BITS, ModulePrecision
from vila_deploy.engine.target import Target
from vila_deploy.formats.module_dtypes import FP16, INT8, head_group_size, is_tower_linear
from vila_deploy.utils.estimates import MemoryItem, PlanStep, available_memory_bytes

# Group size that vila-quantize takes by default, for a checkpoint that is not quantized yet.
DEFAULT_GROUP_SIZE = 128
# A CUDA context with its libraries.
GPU_PROGRAM_BYTES = 800 << 20


class MemoryRow(Enum):
    """Rows of a plan: parts of a model and of an engine's memory; the value is the printed name."""

    DECODER_LINEARS = "llm decoder linears"
    EMBEDDINGS = "llm embeddings"
    HEAD = "llm head"
    BIASES = "llm biases"
    NORMS = "llm norms"
    VISION = "vision tower"
    PROJECTOR = "projector"
    KV_CACHE = "key/value cache"
    ACTIVATIONS = "activations (estimate)"


Items = Mapping[MemoryRow, MemoryItem]


@dataclass(frozen=True)
class Storage:
    """Bits that a backend keeps on the device.

    Args:
        dense_bits: of an unquantized weight and of an activation.
        scale_bits: of a group's scale.
        cache_bits: of a value in an unquantized key/value cache.
        zero_bits: of a group's zero point in the decoder layers.
        head_zero_bits: of a group's zero point in an int4 head.
    """

    dense_bits: int = 16
    scale_bits: int = 16
    cache_bits: int = 16
    zero_bits: int = 4
    head_zero_bits: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """What running an engine takes on its device, as its backend lays it out.

    Args:
        items: memory on the device by row.
        program_bytes: of the process and its libraries.
        in_host_memory: bytes left in the memory of the GPU's host, by module.
        build_steps: what is done between writing graphs and running.
        run_notes: what is said about running, with its memory.
    """

    items: Items
    program_bytes: int = GPU_PROGRAM_BYTES
    in_host_memory: Mapping[str, int] = field(default_factory=dict)
    build_steps: tuple[PlanStep, ...] = ()
    run_notes: tuple[PlanStep, ...] = ()

    @property
    def device_bytes(self) -> int:
        return self.program_bytes + sum(item.bytes for item in self.items.values())


def memory_limit_bytes(target: Target) -> int:
    """Return the memory that an engine may fill on `target`; on a CPU what this host can spare."""
    return target.usable_bytes or available_memory_bytes()


def weight_items(
    config: VilaConfig, precision: str, storage: Storage, module_precision: ModulePrecision
) -> dict[MemoryRow, MemoryItem]:
    """Return the rows of all weights, with the LLM's linears in `precision`."""
    llm = config.llm
    linears = llm.num_layers * sum(map(math.prod, llm.linears.values()))
    group = llm.quantization.group_size if llm.quantization else DEFAULT_GROUP_SIZE
    bits: float = storage.dense_bits
    if precision != FP16:
        bits = llm.value_bits + (storage.scale_bits + storage.zero_bits) / group
    table = llm.vocab_size * llm.hidden_size
    norms = llm.hidden_size * (2 * llm.num_layers + 1)
    tower = list(tower_tensor_specs(config))
    tower_count = parameters(tower)
    tower_mean = tower_bits(tower, module_precision.vision, storage) / tower_count
    rows: dict[MemoryRow, tuple[int, float]] = {
        MemoryRow.DECODER_LINEARS: (linears, bits),
        # Looked up row by row, so it stays in float16 everywhere.
        MemoryRow.EMBEDDINGS: (table, 16),
        MemoryRow.HEAD: (table, _head_bits(llm, module_precision.lm_head, storage)),
        MemoryRow.NORMS: (norms, storage.dense_bits),
        MemoryRow.VISION: (tower_count, tower_mean),
        MemoryRow.PROJECTOR: (parameters(projector_tensor_specs(config)), storage.dense_bits),
    }
    return {row: MemoryItem.of(row.value, count, bits) for row, (count, bits) in rows.items()}


def cache_item(llm: LlmConfig, limits: Limits, storage: Storage, dtype: str) -> MemoryItem:
    """Return the row of the key/value cache; in int8 with a scale for each key and value."""
    per_token = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim
    count = limits.max_batch_size * limits.max_seq_len * per_token
    bits: float = storage.cache_bits
    if dtype != FP16:
        bits = BITS[dtype] + storage.scale_bits / llm.head_dim
    name = f"{MemoryRow.KV_CACHE.value} of {limits.max_seq_len} tokens"
    if limits.max_batch_size > 1:
        name += f" for each of {limits.max_batch_size} sequences"
    return MemoryItem.of(name, count, bits)


def activation_item(count: int, storage: Storage) -> MemoryItem:
    """Return the row of `count` values that live only while the engine computes."""
    return MemoryItem.of(MemoryRow.ACTIVATIONS.value, count, storage.dense_bits)


def tower_activations(config: VilaConfig) -> int:
    """Return the values that one layer of the vision tower holds at its widest: its attention."""
    vision = config.vision
    patches = vision.positions
    width = vision.num_heads * patches + 4 * vision.hidden_size + vision.intermediate_size
    return patches * width


def decoder_activations(llm: LlmConfig, tokens: int) -> int:
    """Return the values that a decoder layer holds with `tokens` of the prompt at a time."""
    return tokens * (6 * llm.hidden_size + 3 * llm.intermediate_size)


def tower_bits(tensors: Iterable[TensorSpec], dtype: str, storage: Storage) -> int:
    """Return the bits of tower weights, whose layers' matrices are `dtype`, a scale a row."""
    bits = 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        if dtype == FP16 or not is_tower_linear(tensor.name, tensor.shape):
            bits += count * storage.dense_bits
        else:
            bits += count * BITS[dtype] + tensor.shape[0] * storage.scale_bits
    return bits


def _head_bits(llm: LlmConfig, dtype: str, storage: Storage) -> float:
    """Bits of a weight of the head, an upper bound.

    In int8 too, backends that know groups only have a scale for each of them. TensorRT keeps two
    matrices of int4, each with its scales.
    """
    if dtype == FP16:
        return storage.dense_bits
    scales = 32 if dtype == INT8 else storage.scale_bits + storage.head_zero_bits
    return BITS[dtype] + scales / head_group_size(llm.hidden_size)
