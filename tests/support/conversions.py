"""Checkpoints to convert into other formats, and whether their weights are the same afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.formats.base import QuantizedLinear

VARIANTS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "grouped queries, group 32": {"kv_heads": 2, "group_size": 32},
    "Qwen2, tied": {"qwen2": True, "tied": True},
    "group 128, shards": {"group_size": 128, "shards": 2},
}


def assert_same_llm(first: Path, second: Path) -> None:
    one, two = open_checkpoint(first), open_checkpoint(second)
    assert one.config.llm.quantization is not None
    for index in range(one.config.llm.num_layers):
        for name in one.config.llm.linears:
            full = f"model.layers.{index}.{name}"
            left, right = one.llm.linear(full), two.llm.linear(full)
            assert isinstance(left, QuantizedLinear)
            assert isinstance(right, QuantizedLinear)
            for field in ("q", "scale", "zero"):
                assert torch.equal(getattr(left, field), getattr(right, field)), (full, field)
            assert (left.bias is None) == (right.bias is None)
            assert left.bias is None or torch.equal(left.bias, right.bias)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(one.llm.tensor(name), two.llm.tensor(name))
    assert one.config.image == two.config.image
    assert one.projector.names() == two.projector.names()


def effective_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the float32 weights that the language model of `checkpoint` computes with."""
    config = checkpoint.config.llm
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    weights = {name: checkpoint.llm.tensor(name).float() for name in names}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"{prefix}.{norm}.weight"
            weights[name] = checkpoint.llm.tensor(name).float()
        for name in config.linears:
            linear = checkpoint.llm.linear(f"{prefix}.{name}")
            quantized = isinstance(linear, QuantizedLinear)
            weights[f"{prefix}.{name}.weight"] = (
                linear.dequantize() if isinstance(linear, QuantizedLinear) else linear.float()
            )
            if config.has_bias(name):
                stored = f"{prefix}.{name}.bias"
                bias = linear.bias if quantized else checkpoint.llm.tensor(stored)
                weights[stored] = bias.float()
    return weights
