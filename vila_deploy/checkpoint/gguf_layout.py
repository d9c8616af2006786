"""What the language model is in a GGUF file: names, order of rows, types, hyperparameters.

Source: conversion/llama.py and conversion/qwen.py of github.com/ggml-org/llama.cpp (b11434).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NORMS,
    QKV,
    LlmConfig,
    layer_prefix,
)
from vila_deploy.formats.base import HEAD_LINEAR

if TYPE_CHECKING:
    from torch import Tensor

MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
FLOAT_TYPES = ("F16", "BF16", "F32")
TABLE_TYPES = (*FLOAT_TYPES, "Q8_0", "Q6_K")


class GgufSpec(NamedTuple):
    """A tensor that a file must have: our name for it, the file's, its shape and allowed types."""

    source: str
    name: str
    shape: tuple[int, ...]
    types: tuple[str, ...]


def tensor_specs(
    config: LlmConfig,
    table_types: tuple[str, ...] = TABLE_TYPES,
    linear_types: tuple[str, ...] = FLOAT_TYPES,
    head_types: tuple[str, ...] = (),
    types_of: Mapping[str, tuple[str, ...]] | None = None,
) -> Iterator[GgufSpec]:
    """Yield every tensor in the order in which it is written.

    Args:
        table_types: of the embedding and the head.
        linear_types: of the decoder's linears.
        head_types: of the head where it differs, beside the embedding even where the two are tied.
        types_of: of linears that differ from `linear_types`, by full name, and of a quantized head.
    """
    table = (config.vocab_size, config.hidden_size)
    yield GgufSpec(EMBEDDING, ENDS[EMBEDDING], table, table_types)
    yield GgufSpec(FINAL_NORM, ENDS[FINAL_NORM], (config.hidden_size,), ("F32",))
    if head_types or not config.tie_word_embeddings:
        quantized = (types_of or {}).get(HEAD_LINEAR, ())
        yield GgufSpec(HEAD, ENDS[HEAD], table, quantized or head_types or table_types)
    for index in range(config.num_layers):
        ours, theirs = layer_prefix(index), f"blk.{index}"
        for norm in NORMS:
            name = f"{theirs}.{MODULES[norm]}.weight"
            yield GgufSpec(f"{ours}.{norm}.weight", name, (config.hidden_size,), ("F32",))
        for linear, shape in config.linears.items():
            name = f"{theirs}.{MODULES[linear]}"
            types = (types_of or {}).get(f"{ours}.{linear}", linear_types)
            yield GgufSpec(f"{ours}.{linear}.weight", f"{name}.weight", shape, types)
            if config.has_bias(linear):
                yield GgufSpec(f"{ours}.{linear}.bias", f"{name}.bias", shape[:1], ("F32",))


def hyperparameters(config: LlmConfig) -> dict[str, Any]:
    """Return the metadata that llama.cpp computes with, all but the context length."""
    family = config.family.name
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.rope_factor != 1:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_factor}
    named = {f"{family}.{key}": value for key, value in values.items()}
    return {"general.architecture": family, **named}


def row_order(config: LlmConfig, name: str) -> Tensor | None:
    """Return which row of ours each row of the file is; None where they are in the same order.

    llama.cpp turns neighbouring rows of a Llama's queries and keys (x, y, x, y …), where
    transformers turns the first half of a head with the second (x, x …, y, y …).

    Args:
        name: of a linear or its tensor, e.g. `model.layers.0.self_attn.q_proj`.
    """
    import torch

    if config.family.name != "llama" or not any(f".{linear}" in name for linear in QKV[:2]):
        return None
    heads = config.num_heads if f".{QKV[0]}" in name else config.num_kv_heads
    rows = torch.arange(heads * config.head_dim)
    return rows.view(heads, 2, config.head_dim // 2).transpose(1, 2).reshape(-1)
