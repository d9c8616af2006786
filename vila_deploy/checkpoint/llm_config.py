"""Shapes and constants of the language model, read from llm/config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vila_deploy.checkpoint.quantization import load_quantization
from vila_deploy.checkpoint.variants import LLM_FAMILIES, LlmFamily
from vila_deploy.formats.base import (
    BITS,
    HEAD_LINEAR,
    SYMMETRIC_BITS,
    QuantizationConfig,
    QuantScheme,
)
from vila_deploy.utils.errors import short
from vila_deploy.utils.fields import Fields

# Tensors outside the decoder layers.
EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
HEAD = f"{HEAD_LINEAR}.weight"
# "linear" divides positions by a factor.
ROPE_TYPES = ("default", "linear")
# Modules of a decoder layer; each norm has one weight [hidden_size].
NORMS = ("input_layernorm", "post_attention_layernorm")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LINEARS = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def layer_prefix(index: int) -> str:
    """Return what the names of decoder layer `index` begin with, e.g. `model.layers.3`."""
    return f"model.layers.{index}"


@dataclass(frozen=True)
class LlmConfig:
    """Shapes and constants of the language model, and how it is quantized.

    `rope_factor`: positions are divided by it before they turn queries and keys (linear scaling).
    """

    family: LlmFamily
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None
    rope_factor: float = 1.0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name within a decoder layer → (out_features, in_features), in the order of LINEARS."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def layer_linears(self, index: int) -> dict[str, tuple[int, int]]:
        """Return the same of decoder layer `index`, under full names."""
        prefix = layer_prefix(index)
        return {f"{prefix}.{name}": sizes for name, sizes in self.linears.items()}

    def mean_bits(self, scheme: QuantScheme) -> float:
        """Return the mean bits of a quantized value over all linears of the layers."""
        if not scheme.linear_bits:
            return scheme.bits
        layers = range(self.num_layers)
        sizes = {n: math.prod(s) for i in layers for n, s in self.layer_linears(i).items()}
        return sum(scheme.of(n).bits * size for n, size in sizes.items()) / sum(sizes.values())

    @property
    def value_bits(self) -> float:
        """Mean bits of a quantized value; 4 for a model that is not quantized yet."""
        return BITS if self.quantization is None else self.mean_bits(self.quantization.scheme)

    @property
    def head_is_quantized(self) -> bool:
        """Whether the output head is stored like a linear of the layers, in bits of its own."""
        return self.quantization is not None and HEAD_LINEAR in self.quantization.linear_bits

    def has_bias(self, linear: str) -> bool:
        """Return whether a linear of `linears` has a bias."""
        return self.family.qkv_bias and linear in QKV


def load_llm_config(fields: Fields, generation: Fields) -> LlmConfig:
    """Read llm/config.json and the stop tokens of generation_config.json."""
    architectures = fields.values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in LLM_FAMILIES:
        raise fields.error(
            "architectures",
            f"unknown LLM family {short(architectures if name is None else name)}",
            f"this version supports {', '.join(sorted(LLM_FAMILIES))}",
        )
    family = LLM_FAMILIES[name]
    # transformers' AutoModel goes by the latter.
    if fields.text("model_type", family.name) != family.name:
        raise fields.error(
            "model_type",
            f"{short(fields.values['model_type'])} contradicts architectures {name}",
            f"use '{family.name}', or correct architectures",
        )
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads", high=4096)
    kv_heads = fields.integer("num_key_value_heads", heads, high=4096)
    if hidden % heads and "head_dim" not in fields:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    head_dim = fields.integer("head_dim", hidden // heads, high=4096)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary embedding, found {head_dim}")
    fields.choice("hidden_act", ("silu",), "silu", what="activation")
    for flag, expected in (("attention_bias", family.qkv_bias), ("mlp_bias", False)):
        if fields.boolean(flag, expected) != expected:
            raise fields.error(flag, f"{family.name} always has {str(expected).lower()} here")
    if fields.boolean("use_sliding_window", False):
        raise fields.error("use_sliding_window", "sliding-window attention is not supported")
    vocab = fields.integer("vocab_size")
    stops = {*fields.integers("eos_token_id", []), *generation.integers("eos_token_id", [])}
    bos = fields.integer("bos_token_id", -1, low=-1)
    return LlmConfig(
        family=family,
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers", high=1024),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=vocab,
        rope_theta=_rope_theta(fields),
        rope_factor=_rope_factor(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, low=1e-12, high=1.0),
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        # The model never chooses ids beyond its vocabulary, so such stops change nothing.
        bos_token_id=bos if 0 <= bos < vocab else None,
        eos_token_ids=tuple(sorted(stop for stop in stops if stop < vocab)),
        quantization=load_quantization(fields),
    )


def check_quantized_linears(config: LlmConfig, fields: Fields) -> None:
    """Raise for inputs that are no whole groups, outputs that are no whole words, unknown names."""
    if config.quantization is None:
        return
    known = {name for index in range(config.num_layers) for name in config.layer_linears(index)}
    if not config.tie_word_embeddings:
        known.add(HEAD_LINEAR)
    for name in config.quantization.linear_bits:
        if name not in known:
            what = f"has bits for {short(name)}, a linear that this model lacks"
            raise fields.error("quantization_config", what)
    head_bits = config.quantization.linear_bits.get(HEAD_LINEAR, SYMMETRIC_BITS)
    if head_bits != SYMMETRIC_BITS:
        what = f"has {head_bits} bits for {HEAD_LINEAR}, which may have {SYMMETRIC_BITS}"
        raise fields.error("quantization_config", what)
    group = config.quantization.group_size
    inputs = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads × head_dim": config.num_heads * config.head_dim,
    }
    outputs = {**inputs, "num_key_value_heads × head_dim": config.num_kv_heads * config.head_dim}
    for key, unit, sizes in (
        ("quantization_config.group_size", group, inputs),
        ("quantization_config", 8, outputs),
    ):
        for what, size in sizes.items():
            if size % unit:
                raise fields.error(key, f"{unit} does not divide {what} {size}")


def _rope_theta(fields: Fields) -> float:
    """transformers 5 writes `rope_parameters.rope_theta`, earlier versions a key of its own."""
    if "rope_parameters" in fields:
        return fields.child("rope_parameters").number("rope_theta", 10000.0, low=1.0)
    return fields.number("rope_theta", 10000.0, low=1.0)


def _rope_factor(fields: Fields) -> float:
    """Return what positions are divided by; raise for scaling that is more than that."""
    factor = 1.0
    for key in ("rope_scaling", "rope_parameters"):
        if key not in fields:
            continue
        scaling = fields.child(key)
        kind = scaling.text("rope_type", scaling.text("type", "default"))
        if kind not in ROPE_TYPES:
            raise fields.error(
                key,
                f"rope type {short(kind)} is not supported",
                f"this version supports {' and '.join(ROPE_TYPES)}",
            )
        if scaling.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error(key, "partial rotary embedding is not supported")
        if kind == "linear":
            factor = scaling.number("factor", low=1.0, high=1e4)
    return factor
