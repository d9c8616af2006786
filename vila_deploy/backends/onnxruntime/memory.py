"""Memory of an onnxruntime engine, whose CPU kernels compute in float32."""

from __future__ import annotations

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.memory import (
    MemoryEstimate,
    MemoryRow,
    Storage,
    activation_item,
    cache_item,
    decoder_activations,
    tower_activations,
    weight_items,
)

# Tokens that go through the LLM at a time: enough to keep the cores busy, little scratch memory.
PREFILL_TOKENS = 256
# float16 weights are widened when they are loaded.
STORAGE = Storage(dense_bits=32, scale_bits=32, cache_bits=32)
# Python with onnxruntime.
PROGRAM_BYTES = 200 << 20


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
    return MemoryEstimate(items, PROGRAM_BYTES)
