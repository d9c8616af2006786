"""Many tokens at once: packed weights through `linear`, attention through torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.backends.native.decode_step import Cache, StepConfig
from vila_deploy.backends.native.float16_range import fit_into_float16
from vila_deploy.backends.native.memory import PREFILL_TOKENS
from vila_deploy.backends.native.weights import Layer, Norm, PackedLlm
from vila_deploy.kernels.linear import linear
from vila_deploy.kernels.packed_linear import ROWS
from vila_deploy.kernels.rope_kv import rope_kv


def prefill(config: StepConfig, llm: PackedLlm, cache: Cache, embeds: Tensor, start: int) -> Tensor:
    """Append `embeds` to the cache from position `start` on, and move its position behind them.

    Args:
        embeds: float32 [tokens, hidden].

    Returns:
        The last token's residual behind the last layer, float32 [hidden].
    """
    residual = embeds
    for first in range(0, len(embeds), PREFILL_TOKENS):
        residual = embeds[first : first + PREFILL_TOKENS].clone()
        cache.position.fill_(start + first)
        mask = _mask(start + first, residual)
        for index, layer in enumerate(llm.layers):
            _attention(config, llm, cache, index, layer, residual, start + first, mask)
            _mlp(config, layer, residual)
    cache.position.fill_(start + len(embeds))
    return residual[-1]


def _mask(start: int, residual: Tensor) -> Tensor | None:
    """Return which positions each token sees, token i those up to start + i; None if causal."""
    if not start:
        return None
    tokens = len(residual)
    return residual.new_ones(tokens, start + tokens, dtype=torch.bool).tril(start)


def _attention(
    config: StepConfig, llm: PackedLlm, cache: Cache, index: int, layer: Layer, residual: Tensor,
    start: int, mask: Tensor | None,
) -> None:  # fmt: skip
    sizes, tokens = config.llm, len(residual)
    x = _normed(residual, layer.input_norm, sizes.rms_norm_eps)
    qkv = linear(x, layer.qkv, layer.qkv_bias, config.capability)
    q = x.new_empty((tokens, sizes.num_heads, sizes.head_dim))
    keys, values, scales = cache.layer(index)
    rope_kv(qkv, llm.cos, llm.sin, cache.position, q, keys, values, scales)()
    end = start + tokens
    k, v = (vectors[None] for vectors in cache.read(index, end))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, mask, is_causal=not start,
        enable_gqa=sizes.num_heads != sizes.num_kv_heads,
    )  # fmt: skip
    attended = attended[0].transpose(0, 1).flatten(1)
    residual += linear(attended, layer.o, None, config.capability, torch.float32)


def _mlp(config: StepConfig, layer: Layer, residual: Tensor) -> None:
    x = _normed(residual, layer.post_norm, config.llm.rms_norm_eps)
    pairs = linear(x, layer.gate_up, None, config.capability).unflatten(1, (-1, 2, ROWS))
    inner = torch.nn.functional.silu(pairs[:, :, 0].float(), inplace=True).mul_(pairs[:, :, 1])
    inner, scale = fit_into_float16(inner.flatten(1)[:, : config.llm.intermediate_size])
    residual += linear(inner, layer.down, None, config.capability, torch.float32).mul_(scale)


def _normed(residual: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """Return RMSNorm of the float32 residual, rounded to float16 once."""
    factor = torch.rsqrt(residual.square().mean(1, keepdim=True) + epsilon)
    return (residual * factor * (norm.weight * norm.prescale)).half()
