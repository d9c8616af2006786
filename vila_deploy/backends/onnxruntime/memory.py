"""Memory of an onnxruntime engine, whose CPU kernels compute in float32 or int8."""

from __future__ import annotations

from dataclasses import replace

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.tensor_schema import parameters, tower_tensor_specs
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.memory import (
    DEFAULT_GROUP_SIZE,
    MemoryEstimate,
    MemoryRow,
    Storage,
    activation_item,
    cache_item,
    decoder_activations,
    tower_activations,
    weight_items,
)
from vila_deploy.formats.base import BITS
from vila_deploy.formats.module_dtypes import FP16, INT8, INT8X2
from vila_deploy.utils.estimates import MemoryItem

# Tokens that go through the LLM at a time: as fast as 256 and 512, with less scratch memory.
PREFILL_TOKENS = 128
# float16 weights are widened when they are loaded.
STORAGE = Storage(dense_bits=32, scale_bits=32, cache_bits=32)
# Python with onnxruntime.
PROGRAM_BYTES = 200 << 20
# Of a group of 4-bit weights: its scale in the file, mapped into memory, and its zero point.
MAPPED_GROUP_BITS = 32 + 4
# What the kernels for int8 activations pack beside the weights: the scale again, and a sum.
PACKED_GROUP_BITS = 32 + 32


def estimate_memory(config: VilaConfig, request: BuildRequest, precision: str) -> MemoryEstimate:
    """Return the memory of weights, cache and the wider of tower and decoder activations."""
    llm, limits, modules = config.llm, request.limits, request.module_precision
    chunk = min(PREFILL_TOKENS, limits.max_input_len)
    widest = max(tower_activations(config), decoder_activations(llm, chunk))
    items = {
        **weight_items(config, precision, STORAGE, modules),
        MemoryRow.KV_CACHE: cache_item(llm, limits, STORAGE, modules.kv_cache),
        MemoryRow.ACTIVATIONS: activation_item(widest + llm.vocab_size, STORAGE),
    }
    if precision != FP16:
        group = llm.quantization.group_size if llm.quantization else DEFAULT_GROUP_SIZE
        linears = items[MemoryRow.DECODER_LINEARS]
        bits = linear_bits(group, request.activations, _value_bits(llm))
        items[MemoryRow.DECODER_LINEARS] = MemoryItem.of(linears.name, linears.parameters, bits)
    return MemoryEstimate(items, PROGRAM_BYTES)


def float_tower_bytes(config: VilaConfig) -> int:
    """Return the memory to load the vision tower in float32: twice its bytes while it is packed."""
    return 8 * parameters(tower_tensor_specs(config))


def _value_bits(config: LlmConfig) -> float:
    """Return the mean bits of a quantized value as it is stored; 5 bits take a byte."""
    if config.quantization is None:
        return BITS
    scheme = config.quantization.scheme
    stored = {name: BITS if bits == BITS else 8 for name, bits in scheme.linear_bits.items()}
    return config.mean_bits(replace(scheme, linear_bits=stored))


def linear_bits(group_size: int, activations: str | None, value_bits: float = BITS) -> float:
    """Return the bits in memory of a quantized weight, with its share of what a group has.

    A graph packs the weights for its kernel; with int8x2 there are two graphs.
    """
    packed_int8, packed_float = value_bits + PACKED_GROUP_BITS / group_size, value_bits
    packed = {INT8: packed_int8, INT8X2: packed_int8 + packed_float}
    return packed.get(activations or "", packed_float) + MAPPED_GROUP_BITS / group_size
