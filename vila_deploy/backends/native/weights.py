"""The language model as the kernels take it: packed layer by layer, a file each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vila_deploy.checkpoint.llm_config import EMBEDDING, FINAL_NORM, HEAD, LlmConfig, layer_prefix
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.module_dtypes import FP16, INT8, head_group_size
from vila_deploy.kernels.packed_linear import (
    FLOAT_BLOCK,
    INT8_GROUP,
    PackedLinear,
    concat_rows,
    empty_like_packed,
    interleave,
    pack_float,
    pack_int4,
    pack_int8,
)
from vila_deploy.onnx_export.rotary import rotary_tables
from vila_deploy.onnx_export.rounding import round_int4
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import Advance

# Rows of lm_head that are packed at a time, so that memory stays bounded.
HEAD_ROWS = 4096


@dataclass(frozen=True)
class Norm:
    """RMSNorm's weight float32 [hidden], over the power of two `prescale`: at most 1.

    The residual times this weight then fits into float16 wherever the residual itself does.
    """

    weight: Tensor
    prescale: float

    @classmethod
    def of(cls, weight: Tensor) -> Norm:
        """Return the norm whose weight [hidden] is `weight`."""
        largest = float(weight.float().abs().max())
        prescale = 2.0 ** max(0, math.ceil(math.log2(largest))) if largest > 0 else 1.0
        return cls(weight.float() / prescale, prescale)


@dataclass(frozen=True)
class Layer:
    """A decoder layer; `qkv_bias` is float32 or None, `gate_up` interleaved."""

    input_norm: Norm
    qkv: PackedLinear
    qkv_bias: Tensor | None
    o: PackedLinear
    post_norm: Norm
    gate_up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True)
class PackedLlm:
    """A decoder: `table` float16 [vocabulary, hidden], `cos` and `sin` [positions, dim / 2]."""

    layers: tuple[Layer, ...]
    norm: Norm
    head: PackedLinear
    table: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that a decoding step reads."""
        total = self.head.size_bytes
        for layer in self.layers:
            total += sum(x.size_bytes for x in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return total + 4 * self.norm.weight.numel() * (2 * len(self.layers) + 1)


def pack_layer(config: LlmConfig, weights: WeightSource, index: int) -> Layer:
    """Return decoder layer `index`, repacked from the checkpoint's own form."""
    prefix = layer_prefix(index)

    def linear(block: str, *names: str) -> PackedLinear:
        return pack_concatenated(
            [weights.linear(f"{prefix}.{block}.{name}") for name in names], prefix
        )

    def norm(name: str) -> Norm:
        return Norm.of(weights.tensor(f"{prefix}.{name}.weight"))

    bias = None
    if config.has_bias("self_attn.q_proj"):
        names = (f"{prefix}.self_attn.{name}_proj.bias" for name in "qkv")
        bias = torch.cat([weights.tensor(name).float() for name in names])
    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn", "q_proj", "k_proj", "v_proj"),
        qkv_bias=bias,
        o=linear("self_attn", "o_proj"),
        post_norm=norm("post_attention_layernorm"),
        gate_up=interleave(linear("mlp", "gate_proj"), linear("mlp", "up_proj")),
        down=linear("mlp", "down_proj"),
    )


def pack_concatenated(linears: Sequence[Tensor | QuantizedLinear], where: str) -> PackedLinear:
    """Return linears of the same input as one, rows below each other.

    Raises:
        VilaDeployError: a linear scales its input channels; the message begins with `where`.
    """
    quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    if not quantized:
        return pack_float(torch.cat([x for x in linears if isinstance(x, Tensor)]))
    if any(linear.prequant_scale is not None for linear in quantized):
        raise VilaDeployError(
            "backend native takes no scales of input channels beside the weights",
            where=where,
            fix="quantize with --format awq, which folds them into the norms",
        )
    names = ("q", "scale", "zero")
    q, scale, zero = (torch.cat([getattr(linear, name) for linear in quantized]) for name in names)
    return pack_int4(QuantizedLinear(q, scale, zero))


def pack_head(weight: Tensor, dtype: str) -> PackedLinear:
    """Return lm_head [vocabulary, hidden], by RTN unless `dtype` is fp16.

    int8: symmetric in groups of 128 channels; int4: as `round_int4` for every backend.
    """

    def pack(rows: Tensor) -> PackedLinear:
        if dtype == FP16:
            return pack_float(rows)
        if dtype == INT8:
            return pack_int8(rows)
        return pack_int4(round_int4(rows, head_group_size(weight.shape[1]), HEAD))

    return concat_rows([pack(rows) for rows in weight.split(HEAD_ROWS)])


def head_format(hidden_size: int, dtype: str) -> tuple[int, int]:
    """Return bits of lm_head, and its input channels to a scale."""
    if dtype == FP16:
        return 16, FLOAT_BLOCK
    return (8, INT8_GROUP) if dtype == INT8 else (4, head_group_size(hidden_size))


def shard_names(num_layers: int) -> list[str]:
    """Return the shards of a decoder: one a layer, then the rest, in `pack_shards`'s order."""
    return [*(f"layer-{index:03d}" for index in range(num_layers)), "rest"]


def pack_shards(
    config: LlmConfig,
    weights: WeightSource,
    max_seq_len: int,
    advance: Advance,
    lm_head: str = FP16,
) -> Iterator[Layer | PackedLlm]:
    """Yield each layer in turn, then everything else as a decoder without layers."""
    for index in range(config.num_layers):
        yield pack_layer(config, weights, index)
        advance(f"decoder layer {index}")
    table = weights.tensor(EMBEDDING).half()
    tied = config.tie_word_embeddings
    head = pack_head(table if tied else weights.tensor(HEAD), lm_head)
    cos, sin = rotary_tables(config, max_seq_len)
    norm = Norm.of(weights.tensor(FINAL_NORM))
    yield PackedLlm((), norm, head, table, cos, sin)
    advance("lm_head")


def empty_llm(
    config: LlmConfig,
    max_seq_len: int,
    device: str = "meta",
    lm_head: str = FP16,
) -> PackedLlm:
    """Return a decoder of these sizes without values, as compiling ahead of time needs it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    bits, group = 16, FLOAT_BLOCK
    if config.quantization is not None:
        bits, group = 4, config.quantization.group_size

    def linear(out_features: int, in_features: int) -> PackedLinear:
        return empty_like_packed(out_features, in_features, bits, group, device)

    def norm() -> Norm:
        return Norm(torch.empty(hidden, device=device), 1.0)

    bias = None
    if config.has_bias("self_attn.q_proj"):
        bias = torch.empty(queries + 2 * keys, device=device)
    layers = tuple(
        Layer(
            norm(),
            linear(queries + 2 * keys, hidden),
            bias,
            linear(hidden, queries),
            norm(),
            interleave(linear(inner, hidden), linear(inner, hidden)),
            linear(hidden, inner),
        )
        for _ in range(config.num_layers)
    )
    head_bits, head_group = head_format(hidden, lm_head)
    head = empty_like_packed(config.vocab_size, hidden, head_bits, head_group, device)
    table = torch.empty((config.vocab_size, hidden), dtype=torch.float16, device=device)
    cos, sin = (torch.empty((max_seq_len, config.head_dim // 2), device=device) for _ in range(2))
    return PackedLlm(layers, norm(), head, table, cos, sin)


Shard = TypeVar("Shard", Layer, PackedLlm)


def map_tensors(shard: Shard, change: Callable[[str, Tensor], Tensor]) -> Shard:
    """Return the layer or decoder with every tensor replaced by `change(name, tensor)`."""
    mapped: Shard = _map("", shard, change)
    return mapped


def tensors(shard: Layer | PackedLlm) -> dict[str, Tensor]:
    """Return every tensor under its name in the file."""
    named: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        named[name] = tensor
        return tensor

    _map("", shard, keep)
    return named


def norm_prescales(shard: Layer | PackedLlm) -> dict[str, float]:
    """Return the prescale of each norm outside of `layers`, by its field: they are no tensors."""
    values = ((field.name, getattr(shard, field.name)) for field in fields(shard))
    return {name: value.prescale for name, value in values if isinstance(value, Norm)}


def with_prescales(shard: Shard, prescales: Mapping[str, float]) -> Shard:
    """Return the shard with the prescales that `norm_prescales` gave."""
    norms = {name: replace(getattr(shard, name), prescale=p) for name, p in prescales.items()}
    return replace(shard, **norms)


def _map(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """Return a dataclass, or a tuple of them, with its tensors replaced."""
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, tuple):
        return tuple(_map(f"{name}.{i}", element, change) for i, element in enumerate(value))
    if not isinstance(value, Norm | Layer | PackedLinear | PackedLlm):
        return value
    dot = f"{name}." if name else ""
    inner = {f.name: _map(dot + f.name, getattr(value, f.name), change) for f in fields(value)}
    return type(value)(**inner)
