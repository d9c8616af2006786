"""compressed-tensors' "pack-quantized" format: eight 4-bit values in an int32 along the inputs.

Source: `PackedQuantizationCompressor` and its helpers in compressed-tensors 0.20. Values and zero
points are stored as what their signed counterparts −8..7 become by adding 8, so as q and zero
themselves. With N output and K input channels and groups of G:

- weight_packed int32 [N, K/8]: nibble i (bits 4i..4i+3) of word [n, k] is the value [n, 8k + i].
- weight_scale float16 [N, K/G].
- weight_zero_point int32 [N/8, K/G]: nibble i of word [n, g] is the zero point [8n + i, g]; there
  is none if the quantization is symmetric.
- weight_shape int64 [2]: N, K.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vila_deploy.formats.base import (
    BITS,
    FLOATS,
    SYMMETRIC_ZERO,
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
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

PER_WORD = 32 // BITS  # 8
FORMAT = "pack-quantized"
FIX = "this is not a pack-quantized checkpoint of that group size"
# Orders in which GPTQ may have treated the columns without storing them in another.
PLAIN_ORDERS = (None, False, "weight", "static")


class PackQuantized(Packing):
    """compressed-tensors, which llm-compressor writes and transformers, vLLM and SGLang load."""

    version = FORMAT
    quant_method = "compressed-tensors"
    marker = "weight_packed"
    tensors = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        groups = columns // group_size
        yield TensorSpec("weight_packed", (rows, columns * bits // 32), ("I32",))
        yield TensorSpec("weight_scale", (rows, groups), ("F16", "BF16"))
        yield TensorSpec("weight_shape", (2,), ("I64",))
        if zero_point:
            yield TensorSpec("weight_zero_point", (rows * bits // 32, groups), ("I32",))

    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        """Return the tensors of one linear; without zero points they must all be 8."""
        import torch

        for size, side in ((linear.out_features, "output"), (linear.in_features, "input")):
            if size % PER_WORD:
                raise VilaDeployError(
                    f"{size} {side} channels don't fill words of {PER_WORD}",
                    where="weight_packed",
                    fix="only linears of such sizes fit compressed-tensors here; choose another "
                    "format",
                )
        only_4_bits(linear, "compressed-tensors")
        no_prequant_scale(linear, "compressed-tensors")
        tensors = {
            "weight_packed": pack_words(linear.q),
            "weight_scale": linear.scale,
            "weight_shape": torch.tensor([linear.out_features, linear.in_features]),
        }
        if zero_point:
            tensors["weight_zero_point"] = pack_words(linear.zero.T).T.contiguous()
        elif not linear.symmetric:
            raise VilaDeployError(
                f"must all be {SYMMETRIC_ZERO} in a symmetric quantization",
                where="zero points",
                fix="correct zero_point in quantization_config",
            )
        if linear.bias is not None:
            tensors["bias"] = linear.bias.half()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], group_size: int) -> QuantizedLinear:
        """Return what `pack` or compressed-tensors wrote, bit for bit; scales may be bfloat16.

        Raises:
            VilaDeployError: a tensor is missing, its dtype, shape or content doesn't fit the
                others, or a bfloat16 scale that float16 can't hold.
        """
        import torch

        words = stored(tensors, "weight_packed")
        if words.ndim != 2 or group_size < 1 or words.shape[1] * PER_WORD % group_size:
            raise _unfit(
                "weight_packed", f"{list(words.shape)} does not hold groups of {group_size}"
            )
        rows, columns = words.shape[0], words.shape[1] * PER_WORD
        packed_zero = tensors.get("weight_zero_point")
        specs = self.tensor_specs(rows, columns, group_size, zero_point=packed_zero is not None)
        check_stored(tensors, (*specs, TensorSpec("bias", (rows,), FLOATS)), FIX)
        shape = tensors["weight_shape"].tolist()
        if shape != [rows, columns]:
            raise _unfit("weight_shape", f"says {shape}, weight_packed holds {[rows, columns]}")
        if packed_zero is None:
            groups = columns // group_size
            zero = torch.full((rows, groups), SYMMETRIC_ZERO, dtype=torch.uint8)
        else:
            zero = unpack_words(packed_zero.T).T.contiguous()
        bias = tensors.get("bias")
        return QuantizedLinear(
            q=unpack_words(words),
            scale=_exact_float16(tensors["weight_scale"]),
            zero=zero,
            bias=None if bias is None else bias.half(),
        )

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        """Return the `quantization_config` that transformers, vLLM and SGLang look for."""
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group",
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        return {
            "quant_method": self.quant_method,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def read_config(self, fields: Fields) -> QuantizationConfig:
        """Return 4-bit integers in groups for all linears alike; which ones, the tensors tell."""
        fields.choice("format", (FORMAT,), what="compressed-tensors format")
        groups = fields.child("config_groups")
        if len(groups.values) != 1:
            raise fields.error(
                "config_groups",
                f"must be one for all linears, found {short(sorted(groups.values))}",
            )
        for key in ("kv_cache_scheme", "transform_config"):
            if fields.values.get(key):
                raise fields.error(key, "is not supported", "quantize without it")
        group = groups.child(next(iter(groups.values)))
        if "input_activations" in group:
            raise group.error("input_activations", "only weights may be quantized")
        weights = group.child("weights")
        weights.choice("type", ("int",), "int", what="type of quantized values")
        weights.choice("strategy", ("group",), what="strategy")
        order = weights.values.get("actorder")
        if order not in PLAIN_ORDERS:
            raise weights.error("actorder", f"{short(order)} moves columns, which is not supported")
        return QuantizationConfig(
            quant_method=self.quant_method,
            bits=weights.integer("num_bits", low=BITS, high=BITS),
            group_size=weights.integer("group_size", low=1),
            zero_point=not weights.boolean("symmetric", True),
            version=self.version,
        )


PACK_QUANTIZED = PackQuantized()


def _exact_float16(scale: Tensor) -> Tensor:
    half = scale.half()
    if not bool((half.float() == scale.float()).all()):
        raise VilaDeployError(
            "holds bfloat16 scales that float16 can't hold",
            where="weight_scale",
            fix="run vila-quantize on the original checkpoint instead",
        )
    return half


def _unfit(name: str, what: str) -> VilaDeployError:
    return VilaDeployError(what, where=name, fix=FIX)
