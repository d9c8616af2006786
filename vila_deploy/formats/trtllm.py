"""TensorRT-LLM's linears and names: W4A16_AWQ and float16, Llama and Qwen2.

Source: TensorRT-LLM's docs/source/architecture/checkpoint.md and tensorrt_llm/models (0.12 to
1.2.1), NVIDIA Model Optimizer's export_tensorrt_llm_checkpoint (0.47). With N output and K input
channels and groups of G, a quantized linear is

- weight int8 [N/2, K]: values −8..7 in two's complement, row 2j in the low, row 2j + 1 in the high
  nibble of byte row j; neither transposed nor interleaved, which trtllm-build does for its GPU.
- weights_scaling_factor float32 [N, K/G]; prequant_scaling_factor float16 [K], by which the input
  is multiplied; bias float16 [N].

An MLP computes silu(fc(x)) · gate(x), so that `fc` is what others call gate and `gate` their up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vila_deploy.formats.base import (
    BITS,
    SYMMETRIC_ZERO,
    Packing,
    QuantizationConfig,
    QuantizedLinear,
    QuantScheme,
    TensorSpec,
    check_stored,
    only_4_bits,
    stored,
)
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZES = (64, 128)
PER_BYTE = 8 // BITS  # 2
# What its int4 kernels tile a rank's share of a linear into.
INPUT_MULTIPLE, OUTPUT_MULTIPLE = 64, 8


@dataclass(frozen=True)
class TrtllmModule:
    """A module's TensorRT-LLM name, and along which side ranks share its weight.

    `split` is "rows" (output channels), "columns" (input channels) or "" for a copy in each rank.
    """

    name: str
    split: str


LINEARS = {
    "self_attn.o_proj": TrtllmModule("attention.dense", "columns"),
    "mlp.gate_proj": TrtllmModule("mlp.fc", "rows"),
    "mlp.up_proj": TrtllmModule("mlp.gate", "rows"),
    "mlp.down_proj": TrtllmModule("mlp.proj", "columns"),
}
JOINED_QKV = TrtllmModule("attention.qkv", "rows")
NORMS = {
    "input_layernorm": TrtllmModule("input_layernorm", ""),
    "post_attention_layernorm": TrtllmModule("post_layernorm", ""),
}
EMBEDDING = TrtllmModule("transformer.vocab_embedding", "rows")
FINAL_NORM = TrtllmModule("transformer.ln_f", "")
HEAD = TrtllmModule("lm_head", "rows")


@dataclass(frozen=True)
class Dense:
    """An unquantized linear: weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


Linear = Dense | QuantizedLinear


class W4A16Awq(Packing):
    """TensorRT-LLM's W4A16_AWQ; our config of it stands for linears in trtllm/ beside llm/."""

    version = "trtllm"
    quant_method = "trtllm"
    marker = "weights_scaling_factor"
    tensors = ("weight", "weights_scaling_factor", "prequant_scaling_factor")

    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        yield TensorSpec("weight", (rows * bits // 8, columns), ("I8",))
        yield TensorSpec("weights_scaling_factor", (rows, columns // group_size), ("F32",))
        yield TensorSpec("prequant_scaling_factor", (columns,), ("F16",))

    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        """Return the tensors of one linear.

        Raises:
            VilaDeployError: zero points, a group size other than 64 or 128, or an odd number of
                rows.
        """
        import torch

        if not linear.symmetric:
            raise asymmetric()
        check_group_size(linear.group_size)
        only_4_bits(linear, "W4A16_AWQ")
        if linear.out_features % PER_BYTE:
            raise VilaDeployError(
                f"W4A16_AWQ packs {PER_BYTE} output channels into a byte, found "
                f"{linear.out_features}",
                fix="this linear does not fit the format; choose another",
            )
        nibbles = linear.q ^ SYMMETRIC_ZERO  # q − 8 in two's complement of 4 bits
        prequant = linear.prequant_scale
        if prequant is None:
            prequant = torch.ones(linear.in_features, dtype=torch.float16)
        tensors = {
            "weight": (nibbles[0::2] | nibbles[1::2] << BITS).view(torch.int8).contiguous(),
            "weights_scaling_factor": linear.scale.float().contiguous(),
            "prequant_scaling_factor": prequant.half().contiguous(),
        }
        if linear.bias is not None:
            tensors["bias"] = linear.bias.half().contiguous()
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], group_size: int, bits: int = BITS
    ) -> QuantizedLinear:
        """Return what `pack` wrote, bit for bit; a prequant scale of ones is read as none.

        Others' scales need all bits of float32 and are rounded to float16, as trtllm-build does.

        Raises:
            VilaDeployError: names the tensor that is missing or of another dtype or shape.
        """
        import torch

        weight = stored(tensors, "weight")
        if weight.ndim != 2 or weight.shape[1] % group_size:
            raise VilaDeployError(
                f"shape {list(weight.shape)} does not hold groups of {group_size}",
                where="weight",
                fix="make the checkpoint again",
            )
        rows, columns = PER_BYTE * weight.shape[0], weight.shape[1]
        specs = self.tensor_specs(rows, columns, group_size)
        check_stored(
            tensors,
            (*specs, TensorSpec("bias", (rows,), ("F16",))),
            "this is no W4A16_AWQ checkpoint; make it again",
        )
        octets = weight.view(torch.uint8)
        q = torch.stack((octets & 15, octets >> BITS), 1).flatten(0, 1) ^ SYMMETRIC_ZERO
        scale = tensors["weights_scaling_factor"].half()
        prequant: Tensor | None = tensors["prequant_scaling_factor"]
        if bool((tensors["prequant_scaling_factor"] == 1).all()):
            prequant = None
        zero = torch.full(scale.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
        return QuantizedLinear(q, scale, zero, tensors.get("bias"), prequant)

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": False,
        }

    def read_config(self, fields: Fields) -> QuantizationConfig:
        return QuantizationConfig(
            quant_method=self.quant_method,
            bits=fields.integer("bits", low=BITS, high=BITS),
            group_size=fields.integer("group_size", low=1),
            zero_point=fields.boolean("zero_point", False),
            version=self.version,
        )

    def check(self, scheme: QuantScheme, linears: Mapping[str, tuple[int, int]]) -> None:
        super().check(scheme, linears)
        if not scheme.symmetric:
            raise asymmetric()
        check_group_size(scheme.group_size)


W4A16_AWQ = W4A16Awq()


def asymmetric(where: str | None = None) -> VilaDeployError:
    """Return the error that says that W4A16_AWQ has no zero points."""
    return VilaDeployError(
        "is quantized with zero points, TensorRT-LLM's W4A16_AWQ has none",
        where=where,
        fix="quantize with vila-quantize --symmetric",
    )


def check_group_size(group_size: int, where: str | None = None) -> None:
    """Raise VilaDeployError for a group size that TensorRT-LLM's kernels don't take."""
    if group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"TensorRT-LLM takes groups of {' or '.join(map(str, GROUP_SIZES))}, "
            f"found {group_size}",
            where=where,
            fix="quantize with --group-size 128 or 64",
        )


def rows_of(linear: Linear, start: int, stop: int) -> Linear:
    """Return output channels start..stop."""
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
    """Return input channels start..stop, whole groups; only for linears without bias."""
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


def join_rows(linears: list[Linear], where: str) -> Linear:
    """Return linears of one input as one with all their outputs, as q, k, v in attention.qkv.

    Raises:
        VilaDeployError: quantized and not, or prequant scales that differ: qkv has one for all.
    """
    import torch

    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    dense = [linear for linear in linears if isinstance(linear, Dense)]
    if len(dense) == len(linears):
        return Dense(torch.cat([linear.weight for linear in dense]), bias)
    quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    prequant = quantized[0].prequant_scale
    if dense or any(not _same(linear.prequant_scale, prequant) for linear in quantized):
        raise VilaDeployError(
            "q, k and v differ in how they are quantized, TensorRT-LLM holds them as one linear",
            where=where,
            fix="quantize all three with one prequant scale or none",
        )
    return QuantizedLinear(
        q=torch.cat([linear.q for linear in quantized]),
        scale=torch.cat([linear.scale for linear in quantized]),
        zero=torch.cat([linear.zero for linear in quantized]),
        bias=bias,
        prequant_scale=prequant,
    )


def join_columns(linears: list[Linear]) -> Linear:
    """Return the linear that `columns_of` split."""
    import torch

    dense = [linear for linear in linears if isinstance(linear, Dense)]
    if dense:
        return Dense(torch.cat([linear.weight for linear in dense], 1))
    quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    scales = [linear.prequant_scale for linear in quantized]
    prequant = None
    if any(scale is not None for scale in scales):
        ones = [torch.ones(linear.in_features, dtype=torch.float16) for linear in quantized]
        prequant = torch.cat([o if s is None else s for o, s in zip(ones, scales, strict=True)])
    return QuantizedLinear(
        q=torch.cat([linear.q for linear in quantized], 1),
        scale=torch.cat([linear.scale for linear in quantized], 1),
        zero=torch.cat([linear.zero for linear in quantized], 1),
        prequant_scale=prequant,
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.equal(other)
