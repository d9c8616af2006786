"""GGUF's linears: Q4_1 and Q5_1 with zero points; Q4_0, Q5_0 and Q8_0 without.

Quantized values and scales are kept exactly. Q4_1 stores m = −zero · scale in float16, which rounds
it, and so does Q5_1; zero = round(−m / scale) is exact. A group whose scale is 0 has no weights but
zeros, and reads back with zero point 0. llama.cpp and Ollama read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vila_deploy.formats.base import (
    BITS,
    HEAD_LINEAR,
    SYMMETRIC_BITS,
    Packing,
    QuantizationConfig,
    QuantizedLinear,
    QuantScheme,
    TensorSpec,
    check_bits,
    check_stored,
    no_prequant_scale,
    stored,
    symmetric_zero,
)
from vila_deploy.formats.gguf_file import FIX, TENSOR_TYPES
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
# Tensor types by bits: without zero points, with them.
TYPES = {4: ("Q4_0", "Q4_1"), 5: ("Q5_0", "Q5_1"), SYMMETRIC_BITS: ("Q8_0", "Q8_0")}
# For how many linears a config may name bits.
MAX_NAMED = 1 << 14


class GgufBlocks(Packing):
    """Blocks of 32 weights with their scale; groups of several blocks repeat it."""

    version = "gguf"
    quant_method = "gguf"
    marker = "blocks"
    tensors = ("blocks",)
    widths = tuple(TYPES)

    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        yield TensorSpec(
            "blocks", (rows, columns // BLOCK, _block_bytes(zero_point, bits)), ("U8",)
        )

    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        check_bits(linear, "GGUF", self.widths)
        no_prequant_scale(linear, "GGUF")
        _check_group_size(linear.group_size)
        minimum = None
        if zero_point and linear.bits != SYMMETRIC_BITS:
            minimum = (-linear.zero.float() * linear.scale.float()).half()
            if not bool(minimum.isfinite().all()):
                raise VilaDeployError(
                    "zero point times scale is too large for float16",
                    fix="check that this checkpoint is not damaged",
                )
        elif not linear.symmetric:
            raise VilaDeployError(
                f"must all be {symmetric_zero(linear.bits)} in a symmetric quantization",
                where="zero points",
                fix="correct zero_point in quantization_config",
            )
        tensors = {"blocks": _blocks(linear, minimum)}
        if linear.bias is not None:
            tensors["bias"] = linear.bias.half()
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], group_size: int, bits: int = BITS
    ) -> QuantizedLinear:
        import torch

        from vila_deploy.formats.gguf_blocks import read_blocks

        blocks = stored(tensors, "blocks")
        if blocks.ndim != 3 or group_size % BLOCK or blocks.shape[1] * BLOCK % group_size:
            what = f"{list(blocks.shape)} does not hold groups of {group_size}"
            raise VilaDeployError(what, where="blocks", fix=FIX)
        rows, columns = blocks.shape[0], blocks.shape[1] * BLOCK
        zero_point = blocks.shape[2] == _block_bytes(True, bits)
        specs = self.tensor_specs(rows, columns, group_size, bits, zero_point)
        check_stored(tensors, (*specs, TensorSpec("bias", (rows,))), FIX)
        try:
            q, scale, minimum = read_blocks(blocks, group_size, bits)
        except ValueError as error:
            raise VilaDeployError(str(error), where="blocks", fix=FIX) from error
        zero = torch.full_like(scale, symmetric_zero(bits))
        if minimum is not None:
            zero = torch.round(-minimum.float() / scale.float()).nan_to_num(0)
        expected = minimum is None or (-zero.float() * scale.float()).half() == minimum
        if not bool(torch.isfinite(scale).all()) or not bool(torch.as_tensor(expected).all()):
            what = "has a scale or offset that no quantization of this program gives"
            raise VilaDeployError(what, where="blocks", fix=FIX)
        if not bool(((zero >= 0) & (zero < 2**bits)).all()):
            raise VilaDeployError("has an offset that is no zero point", where="blocks", fix=FIX)
        bias = tensors.get("bias")
        return QuantizedLinear(
            q, scale, zero.to(torch.uint8), None if bias is None else bias.half(), bits=bits
        )

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": not scheme.symmetric,
            **({"linear_bits": dict(scheme.linear_bits)} if scheme.linear_bits else {}),
        }

    def read_config(self, fields: Fields) -> QuantizationConfig:
        group_size = fields.integer("group_size")
        if group_size % BLOCK:
            raise fields.error("group_size", f"must be a multiple of {BLOCK}, found {group_size}")
        return QuantizationConfig(
            quant_method=self.quant_method,
            bits=fields.integer("bits", low=BITS, high=BITS),
            group_size=group_size,
            zero_point=fields.boolean("zero_point"),
            version=self.version,
            linear_bits=self._linear_bits(fields),
        )

    def _linear_bits(self, fields: Fields) -> dict[str, int]:
        if "linear_bits" not in fields:
            return {}
        found = fields.child("linear_bits")
        if len(found.values) > MAX_NAMED:
            raise fields.error("linear_bits", f"names more than {MAX_NAMED} linears")
        held = ", ".join(map(str, self.widths))
        for name, bits in found.values.items():
            if type(bits) is not int or bits not in self.widths:
                what = f"must be one of {held}, found {short(bits)} for {short(name)}"
                raise fields.error("linear_bits", what)
        return dict(found.values)

    def check(self, scheme: QuantScheme, linears: Mapping[str, tuple[int, int]]) -> None:
        super().check(scheme, linears)
        _check_group_size(scheme.group_size)


GGUF_BLOCKS = GgufBlocks()


def dtype(zero_point: bool, bits: int = BITS) -> str:
    """Return the tensor type of linears with or without zero points."""
    return TYPES[bits][zero_point]


def linear_types_of(scheme: QuantScheme) -> dict[str, tuple[str, ...]]:
    """Return the tensor type of each linear that has other than the scheme's bits."""
    return {name: (dtype(not scheme.symmetric, bits),) for name, bits in scheme.linear_bits.items()}


def layer_types_of(scheme: QuantScheme) -> dict[str, tuple[str, ...]]:
    """Return the same of the linears of the layers, without a quantized head."""
    types = linear_types_of(scheme)
    types.pop(HEAD_LINEAR, None)
    return types


def _block_bytes(zero_point: bool, bits: int) -> int:
    return TENSOR_TYPES[dtype(zero_point, bits)].block_bytes


def _blocks(linear: QuantizedLinear, minimum: Tensor | None) -> Tensor:
    from vila_deploy.formats import gguf_blocks

    if linear.bits == SYMMETRIC_BITS:
        return gguf_blocks.eight_bit_blocks(linear.q, linear.scale)
    if linear.bits == BITS:
        return gguf_blocks.four_bit_blocks(linear.q, linear.scale, minimum)
    if minimum is None:
        return gguf_blocks.five_bit_blocks(linear.q, linear.scale, linear.zero)
    return gguf_blocks.five_bit_blocks_with_minimum(linear.q, linear.scale, minimum)


def _check_group_size(group_size: int) -> None:
    if group_size % BLOCK:
        raise VilaDeployError(
            f"GGUF has a scale for {BLOCK} weights or several times {BLOCK}, not for {group_size}",
            fix="quantize with --group-size 32, 64 or 128, or choose another format",
        )
