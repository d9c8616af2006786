"""Memory of a TensorRT-LLM engine on each of its GPUs."""

from __future__ import annotations

from dataclasses import replace

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

STORAGE = Storage()
# Tokens of a prompt whose activations are there at a time; assumed.
PREFILL_TOKENS = 256
# Rows that all GPUs share, and rows that the GPUs of one pipeline stage share.
SHARED_BY_ALL = (MemoryRow.DECODER_LINEARS, MemoryRow.KV_CACHE)
SHARED_BY_A_STAGE = (MemoryRow.EMBEDDINGS, MemoryRow.HEAD)


def estimate_memory(config: VilaConfig, request: BuildRequest, precision: str) -> MemoryEstimate:
    """Return the memory on the fullest GPU: of the stage that has embeddings or head."""
    llm, limits, modules = config.llm, request.limits, request.module_precision
    chunk = min(PREFILL_TOKENS, limits.max_input_len)
    widest = max(tower_activations(config), decoder_activations(llm, chunk))
    items: Items = {
        **weight_items(config, precision, STORAGE, modules),
        MemoryRow.KV_CACHE: cache_item(llm, limits, STORAGE, modules.kv_cache),
        MemoryRow.ACTIVATIONS: activation_item(widest + llm.vocab_size, STORAGE),
    }
    gpus = {row: request.gpus for row in SHARED_BY_ALL}
    gpus |= {row: request.tp for row in SHARED_BY_A_STAGE}
    return MemoryEstimate(
        {row: replace(item, bytes=item.bytes // gpus.get(row, 1)) for row, item in items.items()}
    )
