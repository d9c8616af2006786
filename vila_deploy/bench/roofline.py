"""The bytes that a decoding step reads, and the tokens/s at which memory alone would limit it."""

from __future__ import annotations

from functools import cache

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.memory import Items, MemoryRow, Storage, weight_items
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.target import get_target

# The devices that tables compare with.
DEVICES = {"a100": "A100", "rtx4090": "RTX 4090", "orin": "Orin", "h100": "H100", "h200": "H200"}
STEP_WEIGHTS = (MemoryRow.DECODER_LINEARS, MemoryRow.HEAD, MemoryRow.NORMS)


def weight_bytes_per_step(items: Items) -> int:
    """Return the bytes of weights that a step reads: decoder layers, norms and output head."""
    return sum(items[row].bytes for row in STEP_WEIGHTS)


def cache_values_per_token(num_layers: int, num_kv_heads: int, head_dim: int) -> int:
    """Return how many keys and values a cached token has; a step reads them all."""
    return 2 * num_layers * num_kv_heads * head_dim


def step_bytes(config: VilaConfig, precision: str, context: int = 0) -> int:
    """Return the bytes that a step reads on a GPU with `context` cached tokens.

    int4: 4 bits a weight of the decoder's linears, for each group of 128 a float16 scale and a
    4-bit zero point; all else, with the head and the cache, in float16.
    """
    items = weight_items(config, precision, Storage(), ALL_FP16)
    return weight_bytes_per_step(items) + context * cache_bytes_per_token(config.llm)


def cache_bytes_per_token(llm: LlmConfig, bits: int = 16) -> int:
    """Return the bytes of one cached token with `bits` a value."""
    return cache_values_per_token(llm.num_layers, llm.num_kv_heads, llm.head_dim) * bits // 8


@cache
def roofline(model: str, precision: str, target: str, context: int = 0) -> float:
    """Return the tokens/s of a released model at which the target's published bandwidth ends.

    Raises:
        VilaDeployError: `model` has no preset, or there is no such target.
    """
    bandwidth = get_target(target).bandwidth_bytes_per_s
    assert bandwidth is not None, f"{target} has no published bandwidth"
    return bandwidth / step_bytes(preset(model, precision), precision, context)
