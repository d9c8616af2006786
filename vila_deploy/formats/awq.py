"""AutoAWQ's GEMM format: eight 4-bit values in an int32 along the output channels, interleaved.

With N output and K input channels and groups of G:

- qweight int32 [K, N/8], qzeros int32 [K/G, N/8]: nibble i (bits 4i..4i+3) of a word holds output
  channel 8·word + NIBBLE_ORDER[i].
- scales float16 [K/G, N].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vila_deploy.formats.base import (
    BITS,
    Packing,
    QuantizationConfig,
    QuantizedLinear,
    QuantScheme,
    TensorSpec,
    check_stored,
    no_prequant_scale,
    only_4_bits,
    pack_words,
    stored,
    unpack_words,
)
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

PER_WORD = 32 // BITS  # 8
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqGemm(Packing):
    """AutoAWQ GEMM, which transformers, vLLM and SGLang load."""

    version = "gemm"
    quant_method = "awq"
    marker = "qweight"
    tensors = ("qweight", "qzeros", "scales")

    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        groups, words = columns // group_size, rows * bits // 32
        yield TensorSpec("qweight", (columns, words), ("I32",))
        yield TensorSpec("qzeros", (groups, words), ("I32",))
        yield TensorSpec("scales", (groups, rows), ("F16",))

    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        if linear.out_features % PER_WORD:
            raise VilaDeployError(
                f"AWQ GEMM packs {PER_WORD} output channels into a word, found "
                f"{linear.out_features} channels",
                fix=f"only linears whose out_features is a multiple of {PER_WORD} fit this format",
            )
        only_4_bits(linear, "AWQ GEMM")
        no_prequant_scale(linear, "AWQ GEMM")
        tensors = {
            "qweight": pack_words(linear.q.T, NIBBLE_ORDER),
            "qzeros": pack_words(linear.zero.T, NIBBLE_ORDER),
            "scales": linear.scale.T.contiguous(),
        }
        if linear.bias is not None:
            tensors["bias"] = linear.bias.half()
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], group_size: int, bits: int = BITS
    ) -> QuantizedLinear:
        qweight = stored(tensors, "qweight")
        if qweight.ndim != 2 or group_size < 1 or qweight.shape[0] % group_size:
            raise VilaDeployError(
                f"shape {list(qweight.shape)} does not split into groups of {group_size} rows",
                where="qweight",
                fix="correct group_size in quantization_config",
            )
        rows, columns = qweight.shape[1] * PER_WORD, qweight.shape[0]
        specs = self.tensor_specs(rows, columns, group_size)
        check_stored(
            tensors,
            (*specs, TensorSpec("bias", (rows,), ("F16",))),
            "this is not an AWQ GEMM checkpoint of that group size",
        )
        return QuantizedLinear(
            q=unpack_words(qweight, NIBBLE_ORDER).T.contiguous(),
            scale=tensors["scales"].T.contiguous(),
            zero=unpack_words(tensors["qzeros"], NIBBLE_ORDER).T.contiguous(),
            bias=tensors.get("bias"),
        )

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            # vLLM's Marlin kernels take only this; zero points are stored either way.
            "zero_point": True,
            "symmetric": scheme.symmetric,
            "version": self.version,
            "modules_to_not_convert": ["lm_head"],
        }

    def read_config(self, fields: Fields) -> QuantizationConfig:
        symmetric = fields.boolean("symmetric", False)
        return QuantizationConfig(
            quant_method=self.quant_method,
            bits=fields.integer("bits", low=BITS, high=BITS),
            group_size=fields.integer("group_size", low=1),
            # `symmetric` is our own key, for readers that know AWQ GEMM with zero points only.
            zero_point=fields.boolean("zero_point", True) and not symmetric,
            version=fields.choice("version", ("gemm", "GEMM"), "gemm", what="AWQ format").lower(),
        )


AWQ_GEMM = AwqGemm()
