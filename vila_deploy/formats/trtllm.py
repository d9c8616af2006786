"""TensorRT-LLM's linears and names: W4A16_AWQ and float16, Llama and Qwen2.

Source: TensorRT-LLM's docs/source/architecture/checkpoint.md and tensorrt_llm/models (0.12 to
1.2.1), NVIDIA Model Optimizer's export_tensorrt_llm_checkpoint (0.47). With N output and K input
channels and groups of G, a quantized linear is

- weight int8 [N/2, K]: levels −8..7 in two's complement, row 2j in the low, row 2j + 1 in the high
  nibble of byte row j; neither transposed nor interleaved, which trtllm-build does for its GPU.
- weights_scaling_factor float32 [N, K/G]; prequant_scaling_factor float16 [K], by which the input
  is multiplied; bias float16 [N].

An MLP computes silu(fc(x)) · gate(x), so that `fc` is what others call gate and `gate` their up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vila_deploy.formats.base import BITS, SYMMETRIC_ZERO, QuantizedLinear
from vila_deploy.utils.errors import VilaDeployError

GROUP_SIZES = (64, 128)
PER_BYTE = 8 // BITS  # 2
# What its int4 kernels tile a rank's share of a linear into.
INPUT_MULTIPLE, OUTPUT_MULTIPLE = 64, 8
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: its TensorRT-LLM name, and along which side ranks share it.

    `split` is "rows" (output channels), "columns" (input channels) or "" for a copy in each rank.
    """

    name: str
    split: str


LINEARS = {
    "self_attn.o_proj": Place("attention.dense", "columns"),
    "mlp.gate_proj": Place("mlp.fc", "rows"),
    "mlp.up_proj": Place("mlp.gate", "rows"),
    "mlp.down_proj": Place("mlp.proj", "columns"),
}
JOINED = Place("attention.qkv", "rows")
NORMS = {
    "input_layernorm": Place("input_layernorm", ""),
    "post_attention_layernorm": Place("post_layernorm", ""),
}
EMBEDDING = Place("transformer.vocab_embedding", "rows")
FINAL_NORM = Place("transformer.ln_f", "")
HEAD = Place("lm_head", "rows")


@dataclass(frozen=True)
class Dense:
    """An unquantized linear: weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


Linear = Dense | QuantizedLinear


def pack(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear: weight, weights_scaling_factor, prequant_scaling_factor, bias.

    Raises:
        VilaDeployError: zero points, a group size other than 64 or 128, or an odd number of rows.
    """
    if not linear.symmetric:
        raise asymmetric()
    check_group_size(linear.group_size)
    if linear.out_features % PER_BYTE:
        raise VilaDeployError(
            f"W4A16_AWQ packs {PER_BYTE} output channels into a byte, found {linear.out_features}",
            fix="this linear does not fit the format; choose another",
        )
    nibbles = linear.q ^ SYMMETRIC_ZERO  # q − 8 in two's complement of 4 bits
    prequant = linear.prequant_scale
    if prequant is None:
        prequant = torch.ones(linear.in_features, dtype=torch.float16)
    tensors = {
        "weight": (nibbles[0::2] | nibbles[1::2] << BITS).view(torch.int8).contiguous(),
        "weights_scaling_factor": linear.scale.float().contiguous(),
        "prequant_scaling_factor": prequant.to(torch.float16).contiguous(),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.to(torch.float16).contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    """What `pack` wrote, bit for bit; a prequant scale of ones is read as none.

    Others' scales need all bits of float32 and are rounded to float16, as trtllm-build does.

    Raises:
        VilaDeployError: names the tensor that is missing or of another dtype or shape.
    """
    for name in ("weight", "weights_scaling_factor", "prequant_scaling_factor"):
        if name not in tensors:
            raise VilaDeployError("is missing", where=name, fix="make the checkpoint again")
    weight, scale = tensors["weight"], tensors["weights_scaling_factor"]
    columns = weight.shape[-1]
    groups = scale.shape[-1] if scale.ndim == 2 else 0
    rows = PER_BYTE * weight.shape[0]
    for name, dtype, shape in (
        ("weight", torch.int8, (rows // PER_BYTE, columns)),
        ("weights_scaling_factor", torch.float32, (rows, groups)),
        ("prequant_scaling_factor", torch.float16, (columns,)),
        ("bias", torch.float16, (rows,)),
    ):
        found = tensors.get(name)
        if found is not None and (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise VilaDeployError(
                f"must be {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}",
                where=name,
                fix="this is no W4A16_AWQ checkpoint; make it again",
            )
    if not groups or columns % groups:
        raise VilaDeployError(
            f"{groups} groups do not divide {columns} input channels",
            where="weights_scaling_factor",
            fix="make the checkpoint again",
        )
    raw = weight.view(torch.uint8)
    q = torch.stack((raw & 15, raw >> BITS), 1).flatten(0, 1) ^ SYMMETRIC_ZERO
    half = scale.to(torch.float16)
    prequant: Tensor | None = tensors["prequant_scaling_factor"]
    if bool((tensors["prequant_scaling_factor"] == 1).all()):
        prequant = None
    zero = torch.full(scale.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
    return QuantizedLinear(q, half, zero, tensors.get("bias"), prequant)


def asymmetric(where: str | None = None) -> VilaDeployError:
    """Says that W4A16_AWQ has no zero points."""
    return VilaDeployError(
        "is quantized with zero points, TensorRT-LLM's W4A16_AWQ has none",
        where=where,
        fix="quantize with vila-quantize --symmetric",
    )


def check_group_size(group_size: int, where: str | None = None) -> None:
    """Raises VilaDeployError for a group size that TensorRT-LLM's kernels don't take."""
    if group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"TensorRT-LLM takes groups of {' or '.join(map(str, GROUP_SIZES))}, "
            f"found {group_size}",
            where=where,
            fix="quantize with --group-size 128 or 64",
        )


def rows_of(linear: Linear, start: int, stop: int) -> Linear:
    """Some of the output channels."""
    bias = None if linear.bias is None else linear.bias[start:stop]
    if isinstance(linear, Dense):
        return Dense(linear.weight[start:stop], bias)
    return replace(
        linear,
        q=linear.q[start:stop],
        scale=linear.scale[start:stop],
        zero=linear.zero[start:stop],
        bias=bias,
    )


def columns_of(linear: Linear, start: int, stop: int) -> Linear:
    """Some of the input channels, whole groups of them; only for linears without bias."""
    assert linear.bias is None
    if isinstance(linear, Dense):
        return Dense(linear.weight[:, start:stop])
    group, prequant = linear.group_size, linear.prequant_scale
    assert start % group == stop % group == 0
    return replace(
        linear,
        q=linear.q[:, start:stop],
        scale=linear.scale[:, start // group : stop // group],
        zero=linear.zero[:, start // group : stop // group],
        prequant_scale=None if prequant is None else prequant[start:stop],
    )


def join_rows(parts: list[Linear], where: str) -> Linear:
    """Linears of one input above each other, as q, k and v in attention.qkv.

    Raises:
        VilaDeployError: quantized and not, or prequant scales that differ: qkv has one for all.
    """
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat(biases) if biases else None
    dense = [part for part in parts if isinstance(part, Dense)]
    if len(dense) == len(parts):
        return Dense(torch.cat([part.weight for part in dense]), bias)
    quantized = [part for part in parts if isinstance(part, QuantizedLinear)]
    prequant = quantized[0].prequant_scale
    if dense or any(not _same(part.prequant_scale, prequant) for part in quantized):
        raise VilaDeployError(
            "q, k and v differ in how they are quantized, TensorRT-LLM holds them as one linear",
            where=where,
            fix="quantize all three with one prequant scale or none",
        )
    return QuantizedLinear(
        q=torch.cat([part.q for part in quantized]),
        scale=torch.cat([part.scale for part in quantized]),
        zero=torch.cat([part.zero for part in quantized]),
        bias=bias,
        prequant_scale=prequant,
    )


def join_columns(parts: list[Linear]) -> Linear:
    """What `columns_of` cut, together again."""
    dense = [part for part in parts if isinstance(part, Dense)]
    if dense:
        return Dense(torch.cat([part.weight for part in dense], 1))
    quantized = [part for part in parts if isinstance(part, QuantizedLinear)]
    scales = [part.prequant_scale for part in quantized]
    prequant = None
    if any(scale is not None for scale in scales):
        ones = [torch.ones(part.in_features, dtype=torch.float16) for part in quantized]
        prequant = torch.cat([o if s is None else s for o, s in zip(ones, scales, strict=True)])
    return QuantizedLinear(
        q=torch.cat([part.q for part in quantized], 1),
        scale=torch.cat([part.scale for part in quantized], 1),
        zero=torch.cat([part.zero for part in quantized], 1),
        prequant_scale=prequant,
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
