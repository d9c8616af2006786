"""GGUF's 4-bit linears: Q4_1 with zero points, Q4_0 without; llama.cpp and Ollama read them.

Quantized values and scales are kept exactly. Q4_1 stores m = −zero · scale in float16, which rounds
it; zero = round(−m / scale) is exact. A group whose scale is 0 has no weights but zeros, and reads
back with zero point 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    no_prequant_scale,
    only_4_bits,
    stored,
)
from vila_deploy.formats.gguf_file import FIX, TENSOR_TYPES
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
BLOCK_BYTES = {name: TENSOR_TYPES[name].block_bytes for name in ("Q4_0", "Q4_1")}


class GgufBlocks(Packing):
    """Blocks of 32 weights with their scale; groups of several blocks repeat it."""

    version = "gguf"
    quant_method = "gguf"
    marker = "blocks"
    tensors = ("blocks",)

    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        yield TensorSpec(
            "blocks", (rows, columns // BLOCK, BLOCK_BYTES[dtype(zero_point)]), ("U8",)
        )

    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        from vila_deploy.formats.gguf_blocks import four_bit_blocks

        only_4_bits(linear, "GGUF")
        no_prequant_scale(linear, "GGUF")
        _check_group_size(linear.group_size)
        minimum = None
        if zero_point:
            minimum = (-linear.zero.float() * linear.scale.float()).half()
            if not bool(minimum.isfinite().all()):
                raise VilaDeployError(
                    "zero point times scale is too large for float16",
                    fix="check that this checkpoint is not damaged",
                )
        elif not linear.symmetric:
            raise VilaDeployError(
                f"must all be {SYMMETRIC_ZERO} in a symmetric quantization",
                where="zero points",
                fix="correct zero_point in quantization_config",
            )
        tensors = {"blocks": four_bit_blocks(linear.q, linear.scale, minimum)}
        if linear.bias is not None:
            tensors["bias"] = linear.bias.half()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], group_size: int) -> QuantizedLinear:
        import torch

        from vila_deploy.formats.gguf_blocks import read_four_bit_blocks

        blocks = stored(tensors, "blocks")
        if blocks.ndim != 3 or group_size % BLOCK or blocks.shape[1] * BLOCK % group_size:
            what = f"{list(blocks.shape)} does not hold groups of {group_size}"
            raise VilaDeployError(what, where="blocks", fix=FIX)
        rows, columns = blocks.shape[0], blocks.shape[1] * BLOCK
        zero_point = blocks.shape[2] == BLOCK_BYTES["Q4_1"]
        specs = self.tensor_specs(rows, columns, group_size, zero_point=zero_point)
        check_stored(tensors, (*specs, TensorSpec("bias", (rows,))), FIX)
        try:
            q, scale, minimum = read_four_bit_blocks(blocks, group_size)
        except ValueError as error:
            raise VilaDeployError(str(error), where="blocks", fix=FIX) from error
        zero = torch.full_like(scale, SYMMETRIC_ZERO)
        if minimum is not None:
            zero = torch.round(-minimum.float() / scale.float()).nan_to_num(0)
        expected = minimum is None or (-zero.float() * scale.float()).half() == minimum
        if not bool(torch.isfinite(scale).all()) or not bool(torch.as_tensor(expected).all()):
            what = "has a scale or offset that no quantization of this program gives"
            raise VilaDeployError(what, where="blocks", fix=FIX)
        if not bool(((zero >= 0) & (zero <= 15)).all()):
            raise VilaDeployError("has an offset that is no zero point", where="blocks", fix=FIX)
        bias = tensors.get("bias")
        return QuantizedLinear(
            q, scale, zero.to(torch.uint8), None if bias is None else bias.half()
        )

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "zero_point": not scheme.symmetric,
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
        )

    def check(self, scheme: QuantScheme, linears: Mapping[str, tuple[int, int]]) -> None:
        super().check(scheme, linears)
        _check_group_size(scheme.group_size)


GGUF_BLOCKS = GgufBlocks()


def dtype(zero_point: bool) -> str:
    """Return the tensor type of linears with or without zero points."""
    return "Q4_1" if zero_point else "Q4_0"


def _check_group_size(group_size: int) -> None:
    if group_size % BLOCK:
        raise VilaDeployError(
            f"GGUF has a scale for {BLOCK} weights or several times {BLOCK}, not for {group_size}",
            fix="quantize with --group-size 32, 64 or 128, or choose another format",
        )
