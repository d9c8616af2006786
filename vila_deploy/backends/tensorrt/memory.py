"""Memory of a TensorRT engine, and of the compiler that makes it."""

from __future__ import annotations

from vila_deploy.backends.tensorrt.decoder import PREFILL_TOKENS
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.memory import (
    Items,
    MemoryEstimate,
    MemoryRow,
    Storage,
    activation_item,
    cache_item,
    decoder_activations,
    tower_activations,
    weight_items,
)
from vila_deploy.engine.target import Target
from vila_deploy.utils.estimates import MemoryItem, PlanStep, available_memory_bytes

STORAGE = Storage()
PRIMITIVE = "primitive"
# TensorRT's compiler at its peak, in weights of the graph that it compiles: measured with
# tensorrt-rtx 1.7 (1.14 GB for 0.50 GB, 3.6 for 1.51, 10.0 for 4.76, 14.5 for 7.07). What it maps
# of the weights' file comes on top, and leaves again where memory is short. On the device, assumed
# with it.
COMPILER_FACTOR, COMPILER_BYTES = {"tensorrt-rtx": 2.0, "tensorrt": 3.2}, 400 << 20
# Weights of the largest graph, the LLM's.
LLM_GRAPH = (MemoryRow.DECODER_LINEARS, MemoryRow.HEAD, MemoryRow.NORMS)


def estimate_memory(
    config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
) -> MemoryEstimate:
    """Return the memory of the engine on its GPU, and of compiling it here or there."""
    llm, limits, modules = config.llm, request.limits, request.module_precision
    items: Items = {
        **weight_items(config, precision, STORAGE, modules),
        MemoryRow.KV_CACHE: cache_item(llm, limits, STORAGE, modules.kv_cache),
        MemoryRow.ACTIVATIONS: _activations(config, request),
    }
    compile_step = _compile_step(request.target, items, limit_bytes)
    return MemoryEstimate(items, build_steps=(compile_step,))


def compiler_memory_bytes(package: str, weight_bytes: int) -> int:
    """Return what the compiler of `package` needs for a graph of so many bytes; an estimate."""
    return COMPILER_BYTES + int(COMPILER_FACTOR[package] * weight_bytes)


def _activations(config: VilaConfig, request: BuildRequest) -> MemoryItem:
    """Those of tower and decoder, which TensorRT has memory for at the same time.

    Where attention is not one operator, its scores too, twice in float32, and the cache's new rows.
    """
    llm, limits, tensorrt = config.llm, request.limits, request.target.tensorrt
    chunk = min(PREFILL_TOKENS, limits.max_input_len)
    count = tower_activations(config) + decoder_activations(llm, chunk)
    if tensorrt is not None and tensorrt.dialect == PRIMITIVE:
        count += 4 * llm.num_heads * chunk * (limits.max_seq_len + chunk)
        count += 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * chunk
    return activation_item(count + llm.vocab_size, STORAGE)


def _compile_step(target: Target, items: Items, limit_bytes: int) -> PlanStep:
    package = target.tensorrt.package if target.tensorrt else "tensorrt"
    needed = compiler_memory_bytes(package, sum(items[row].bytes for row in LLM_GRAPH))
    if package == "tensorrt-rtx":
        here = "this computer" if needed <= available_memory_bytes() else "one with more memory"
        return PlanStep(f"compile on {here}", needed)
    swap = "" if needed <= limit_bytes else f": {(needed - limit_bytes) / 1e9:.0f} GB of swap"
    return PlanStep(f"compile on {target.title}{swap}", needed)
