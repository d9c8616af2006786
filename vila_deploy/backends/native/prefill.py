"""Many tokens at once: packed weights through `linear`, attention through torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.backends.native.decode_step import Cache, Sizes
from vila_deploy.backends.native.weights import Layer, Norm, PackedLlm
from vila_deploy.kernels.linear import linear
from vila_deploy.kernels.packed_linear import ROWS
from vila_deploy.kernels.rope_kv import rope_kv

CHUNK = 1024  # tokens that go through the decoder at a time


def prefill(sizes: Sizes, llm: PackedLlm, cache: Cache, embeds: Tensor, start: int) -> Tensor:
    """Appends `embeds` float32 [tokens, hidden] at slot `start` → stream [hidden] of the last one.

    The cache's position is set behind them.
    """
    stream = embeds
    for first in range(0, len(embeds), CHUNK):
        stream = embeds[first : first + CHUNK].clone()
        cache.position.fill_(start + first)
        for index, layer in enumerate(llm.layers):
            _attend(sizes, llm, cache, index, layer, stream, start + first)
            _transform(sizes, layer, stream)
    cache.position.fill_(start + len(embeds))
    return stream[-1]


def _attend(
    sizes: Sizes, llm: PackedLlm, cache: Cache, index: int, layer: Layer, stream: Tensor, start: int
) -> None:
    config, tokens = sizes.config, len(stream)
    x = _normed(stream, layer.input_norm, config.rms_norm_eps)
    qkv = linear(x, layer.qkv, layer.qkv_bias, sizes.sm)
    q = x.new_empty((tokens, config.num_heads, config.head_dim))
    keys, values, scales = cache.layer(index)
    rope_kv(qkv, llm.cos, llm.sin, cache.position, q, keys, values, scales)()
    end = start + tokens
    k, v = (part[None] for part in cache.read(index, end))
    # Token i sees the cache up to start + i.
    mask = None
    if start:
        mask = torch.ones(tokens, end, dtype=torch.bool, device=q.device).tril(start)
    attended = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, mask, is_causal=not start,
        enable_gqa=config.num_heads != config.num_kv_heads,
    )  # fmt: skip
    stream += linear(attended[0].transpose(0, 1).flatten(1), layer.o, None, sizes.sm)


def _transform(sizes: Sizes, layer: Layer, stream: Tensor) -> None:
    x = _normed(stream, layer.post_norm, sizes.config.rms_norm_eps)
    both = linear(x, layer.gate_up, None, sizes.sm).unflatten(1, (-1, 2, ROWS))
    gate, up = (both[:, :, half].flatten(1) for half in (0, 1))
    inner = torch.nn.functional.silu(gate) * up
    inner = inner[:, : sizes.config.intermediate_size].contiguous()
    stream += linear(inner, layer.down, None, sizes.sm)


def _normed(stream: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """RMSNorm of the float32 stream, rounded to float16 once."""
    factor = torch.rsqrt(stream.square().mean(1, keepdim=True) + epsilon)
    return (stream * factor * (norm.weight * norm.unit)).half()
