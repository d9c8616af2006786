"""Runs a TensorRT-LLM checkpoint as its engines would, from the files alone; nothing of ours.

Every rank computes its share, as tensorrt_llm/layers/attention.py and mlp.py lay it out: sums over
the ranks of a stage stand for all-reduce, joined rows for all-gather.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor


def unpacked(weights: dict[str, np.ndarray], name: str) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and the factors [in] of its input, in float64."""
    weight = weights[f"{name}.weight"]
    if weight.dtype == np.float16:
        return torch.tensor(weight, dtype=torch.float64), torch.ones(weight.shape[1]).double()
    rows, columns = 2 * weight.shape[0], weight.shape[1]
    values = np.empty((rows, columns), np.float64)
    for row in range(rows):
        byte = weight[row // 2].view(np.uint8)
        nibble = byte >> 4 if row % 2 else byte & 15
        values[row] = np.where(nibble > 7, nibble.astype(int) - 16, nibble)
    scale = weights[f"{name}.weights_scaling_factor"].astype(np.float64)
    values *= np.repeat(scale, columns // scale.shape[1], axis=1)
    factors = weights[f"{name}.prequant_scaling_factor"].astype(np.float64)
    return torch.tensor(values), torch.tensor(factors)


def linear(weights: dict[str, np.ndarray], name: str, x: Tensor) -> Tensor:
    weight, factors = unpacked(weights, name)
    y = (x * factors) @ weight.T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + torch.tensor(bias, dtype=torch.float64)


def rotate(x: Tensor, base: float) -> Tensor:
    """[heads, tokens, size], GPT-NeoX style."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    left, right = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def norm(x: Tensor, weight: np.ndarray, epsilon: float) -> Tensor:
    scaled = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return scaled * torch.tensor(weight, dtype=torch.float64)


def attention(weights: dict, prefix: str, x: Tensor, config: dict) -> Tensor:
    tp, size = config["mapping"]["tp_size"], config["head_size"]
    heads = config["num_attention_heads"] // tp
    kv_heads = (config["num_key_value_heads"] + tp - 1) // tp
    joined = linear(weights, f"{prefix}.qkv", x)
    q, k, v = joined.split([heads * size, kv_heads * size, kv_heads * size], -1)
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in (q, k, v))
    q, k = rotate(q, config["rotary_base"]), rotate(k, config["rotary_base"])
    k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
    scores = q @ k.transpose(1, 2) / size**0.5
    mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v
    return linear(weights, f"{prefix}.dense", mixed.transpose(0, 1).flatten(1))


def logits(folder: Path, tokens: list[int]) -> Tensor:
    """[tokens, padded vocabulary], float64."""
    config = json.loads((folder / "config.json").read_text())
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in range(tp * pp)]
    epsilon = config["norm_epsilon"]
    table = np.concatenate([ranks[t]["transformer.vocab_embedding.weight"] for t in range(tp)])
    x = torch.tensor(table[tokens], dtype=torch.float64)
    for stage in range(pp):
        own = ranks[stage * tp : (stage + 1) * tp]
        for layer in range(config["num_hidden_layers"] // pp):
            prefix = f"transformer.layers.{layer}"
            inner = [norm(x, w[f"{prefix}.input_layernorm.weight"], epsilon) for w in own]
            pairs = list(zip(own, inner, strict=True))
            x = x + sum(attention(w, f"{prefix}.attention", y, config) for w, y in pairs)
            inner = [norm(x, w[f"{prefix}.post_layernorm.weight"], epsilon) for w in own]
            for w, y in zip(own, inner, strict=True):
                gated = torch.nn.functional.silu(linear(w, f"{prefix}.mlp.fc", y))
                x = x + linear(w, f"{prefix}.mlp.proj", gated * linear(w, f"{prefix}.mlp.gate", y))
    last = ranks[-tp:]
    x = norm(x, last[0]["transformer.ln_f.weight"], epsilon)
    return torch.cat([linear(w, "lm_head", x) for w in last], -1)
