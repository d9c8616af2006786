"""The language model as the kernels take it: packed layer by layer, kept in one file."""

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
    empty_like_packed,
    interleave,
    join_rows,
    pack_float,
    pack_int4,
    pack_int8,
)
from vila_deploy.onnx_export.rounding import round_int4
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import Advance

# Rows of lm_head that are packed at a time, so that memory stays bounded.
HEAD_ROWS = 4096


@dataclass(frozen=True)
class Norm:
    """RMSNorm's weight float32 [hidden], divided by the power of two `unit` so that none exceeds 1.

    The stream times this weight then fits into float16 wherever the stream itself does.
    """

    weight: Tensor
    unit: float

    @classmethod
    def of(cls, weight: Tensor) -> Norm:
        largest = float(weight.float().abs().max())
        unit = 2.0 ** max(0, math.ceil(math.log2(largest))) if largest > 0 else 1.0
        return cls(weight.float() / unit, unit)


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
    """A whole decoder; `table` float16 [vocabulary, hidden], `cos` and `sin` [slots, dim / 2]."""

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
    """Decoder layer `index`, repacked from the checkpoint's own form."""
    prefix = layer_prefix(index)

    def linear(block: str, *names: str) -> PackedLinear:
        return pack_joined([weights.linear(f"{prefix}.{block}.{name}") for name in names], prefix)

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


def pack_joined(parts: Sequence[Tensor | QuantizedLinear], where: str) -> PackedLinear:
    """Linears that read the same input as one, rows below each other."""
    quantized = [part for part in parts if isinstance(part, QuantizedLinear)]
    if not quantized:
        return pack_float(torch.cat([part for part in parts if isinstance(part, Tensor)]))
    if any(part.prequant_scale is not None for part in quantized):
        raise VilaDeployError(
            "backend native takes no scales of input channels beside the weights",
            where=where,
            fix="quantize with --format awq, which folds them into the norms",
        )
    joined = QuantizedLinear(
        *(torch.cat([getattr(part, name) for part in quantized]) for name in ("q", "scale", "zero"))
    )
    return pack_int4(joined)


def pack_head(weight: Tensor, dtype: str) -> PackedLinear:
    """lm_head [vocabulary, hidden], rounded to nearest unless `dtype` is fp16.

    int8: symmetric in groups of 128 channels; int4: as `round_int4` for every backend.
    """
    if dtype == FP16:
        pack = pack_float
    elif dtype == INT8:
        pack = pack_int8
    else:
        group_size = head_group_size(weight.shape[1])

        def pack(rows: Tensor) -> PackedLinear:
            return pack_int4(round_int4(rows, group_size, HEAD))

    return join_rows([pack(rows) for rows in weight.split(HEAD_ROWS)])


def head_format(hidden_size: int, dtype: str) -> tuple[int, int]:
    """Bits of lm_head, and its input channels to a scale."""
    if dtype == FP16:
        return 16, FLOAT_BLOCK
    return (8, INT8_GROUP) if dtype == INT8 else (4, head_group_size(hidden_size))


def part_names(num_layers: int) -> list[str]:
    """Files of a decoder: one a layer, then the rest, in the order of `pack_parts`."""
    return [*(f"layer-{index:03d}" for index in range(num_layers)), "rest"]


def pack_parts(
    config: LlmConfig,
    weights: WeightSource,
    max_seq_len: int,
    advance: Advance,
    lm_head: str = FP16,
) -> Iterator[Layer | PackedLlm]:
    """Each layer in turn, then everything else as a decoder without layers."""
    # Only here, since that module needs onnx, which a device may lack.
    from vila_deploy.onnx_export.llm import rotary_tables

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


def pack_llm(
    config: LlmConfig,
    weights: WeightSource,
    max_seq_len: int,
    advance: Advance,
    lm_head: str = FP16,
) -> PackedLlm:
    """Everything but the vision part, all in memory."""
    *layers, rest = pack_parts(config, weights, max_seq_len, advance, lm_head)
    assert isinstance(rest, PackedLlm)
    return replace(rest, layers=tuple(layer for layer in layers if isinstance(layer, Layer)))


def empty_llm(
    config: LlmConfig,
    max_seq_len: int,
    device: str = "meta",
    lm_head: str = FP16,
) -> PackedLlm:
    """A decoder of these sizes without values; what compiling ahead of time needs."""
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


Part = TypeVar("Part", Layer, PackedLlm)


def map_tensors(part: Part, change: Callable[[str, Tensor], Tensor]) -> Part:
    """The same layer or decoder with every tensor replaced by `change(name, tensor)`."""
    mapped: Part = _map("", part, change)
    return mapped


def tensors(part: Layer | PackedLlm) -> dict[str, Tensor]:
    """Every tensor under its name, as it stands in the file."""
    found: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    _map("", part, keep)
    return found


def norm_units(part: Layer | PackedLlm) -> dict[str, float]:
    """The unit of each norm outside of `layers`, by its field; units are no tensors."""
    values = ((field.name, getattr(part, field.name)) for field in fields(part))
    return {name: value.unit for name, value in values if isinstance(value, Norm)}


def with_units(part: Part, units: Mapping[str, float]) -> Part:
    """The same with the units that `norm_units` gave."""
    changed = {name: replace(getattr(part, name), unit=unit) for name, unit in units.items()}
    return replace(part, **changed)


def _map(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """A dataclass, or a tuple of them, with its tensors replaced."""
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, tuple):
        return tuple(_map(f"{name}.{i}", part, change) for i, part in enumerate(value))
    if not isinstance(value, Norm | Layer | PackedLinear | PackedLlm):
        return value
    dot = f"{name}." if name else ""
    inner = {f.name: _map(dot + f.name, getattr(value, f.name), change) for f in fields(value)}
    return type(value)(**inner)
