"""The reference language model: transformers' decoder layers, one at a time or all together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    NORMS,
    LlmConfig,
    layer_prefix,
)
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.base import QuantizedLinear

# transformers' names for the families; norms and rotary embedding are the same in all of them.
FAMILIES = {"llama": (LlamaConfig, LlamaDecoderLayer), "qwen2": (Qwen2Config, Qwen2DecoderLayer)}


def transformers_config(config: LlmConfig) -> PretrainedConfig:
    """Return transformers' config of the same model, with eager attention, which takes a mask."""
    built = FAMILIES[config.family.name][0](
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters=_rope_parameters(config),
    )
    built._attn_implementation = "eager"
    return built


def _rope_parameters(config: LlmConfig) -> dict[str, object]:
    if config.rope_factor == 1.0:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rope_type": "linear", "rope_theta": config.rope_theta, "factor": config.rope_factor
    }  # fmt: skip


def dense_weight(weights: WeightSource, prefix: str, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] of a linear, dequantized where it is stored in 4 bits."""
    linear = weights.linear(prefix)
    return (linear.dequantize() if isinstance(linear, QuantizedLinear) else linear).to(dtype)


def load_decoder_layer(
    config: LlmConfig, weights: WeightSource, index: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return decoder layer `index`; no other layer's weights are read."""
    with torch.device("meta"):
        layer = FAMILIES[config.family.name][1](transformers_config(config), index)
    prefix = f"{layer_prefix(index)}."
    state = {f"{n}.weight": dense_weight(weights, prefix + n, dtype) for n in LINEARS}
    state |= {
        f"{n}.bias": weights.tensor(f"{prefix}{n}.bias").to(dtype)
        for n in LINEARS
        if config.has_bias(n)
    }
    state |= {f"{n}.weight": weights.tensor(f"{prefix}{n}.weight").to(dtype) for n in NORMS}
    layer.load_state_dict(state, strict=True, assign=True)
    return layer.eval().requires_grad_(False)


def rotary(config: LlmConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin [1, tokens, head_dim], float32, for integer `positions` [tokens]."""
    embedding = LlamaRotaryEmbedding(transformers_config(config))  # type: ignore[arg-type]
    return embedding(torch.zeros(1), positions[None])


def causal_mask(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an additive mask [1, 1, queries, keys]; the last query sees every key."""
    blocked = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill(blocked, torch.finfo(dtype).min)[
        None, None
    ]


def run_layer(
    layer: nn.Module,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None = None,
    cache: object | None = None,
) -> Tensor:
    """Return hidden states [batch, tokens, hidden] behind one decoder layer; causal by default.

    Args:
        cos, sin: from `rotary`, for the positions of these tokens.
        cache: a transformers cache that earlier tokens of this sequence went through.
    """
    if mask is None:
        mask = causal_mask(hidden.shape[1], hidden.shape[1], hidden.dtype)
    output = layer(
        hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache
    )
    return output[0] if isinstance(output, tuple) else output


class LanguageModel(nn.Module):
    """The whole decoder: embeddings [tokens, hidden] in, logits out, with a growing cache."""

    def __init__(
        self, config: LlmConfig, weights: WeightSource, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.config = config
        self.embed_tokens = weights.tensor(EMBEDDING).to(dtype)
        self.layers = nn.ModuleList(
            load_decoder_layer(config, weights, i, dtype) for i in range(config.num_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm.weight = nn.Parameter(weights.tensor(FINAL_NORM).to(dtype), requires_grad=False)
        tied = config.tie_word_embeddings
        self.lm_head = self.embed_tokens if tied else weights.tensor(HEAD).to(dtype)

    @torch.inference_mode()
    def forward(self, embeds: Tensor, cache: object | None = None, position: int = 0) -> Tensor:
        """Return logits [tokens, vocab] of embeddings [tokens, hidden], the first at `position`."""
        count = embeds.shape[0]
        cos, sin = rotary(self.config, torch.arange(position, position + count))
        cos, sin = cos.to(embeds.dtype), sin.to(embeds.dtype)
        mask = causal_mask(count, position + count, embeds.dtype)
        hidden = embeds[None]
        for layer in self.layers:
            hidden = run_layer(layer, hidden, cos, sin, mask, cache)
        return nn.functional.linear(self.norm(hidden[0]), self.lm_head)
