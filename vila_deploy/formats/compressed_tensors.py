"""compressed-tensors' "pack-quantized" format: 4- or 8-bit values in int32 along the inputs.

Source: `PackedQuantizationCompressor` and its helpers in compressed-tensors 0.20. Values and zero
points are stored as what their signed counterparts −8..7 become by adding 8, so as q and zero
themselves. With N output and K input channels, groups of G, and in 4 bits:

- weight_packed int32 [N, K/8]: nibble i (bits 4i..4i+3) of word [n, k] is the value [n, 8k + i].
- weight_scale float16 [N, K/G].
- weight_zero_point int32 [N/8, K/G]: nibble i of word [n, g] is the zero point [8n + i, g]; there
  is none if the quantization is symmetric, as in 8 bits it always is here.
- weight_shape int64 [2]: N, K.

Linears in 8 bits are named in a second config group, the output head among them if it is quantized;
the first is for all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vila_deploy.formats.base import (
    BITS,
    FLOATS,
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
    pack_words,
    stored,
    symmetric_zero,
    unpack_words,
)
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

PER_WORD = 32 // BITS  # 8
# Linears that a group may name, and how many at most.
LINEAR = re.compile(rf"{HEAD_LINEAR}|model\.layers\.\d{{1,4}}\.(self_attn|mlp)\.[a-z]+_proj")
MAX_TARGETS = 1 << 14
MAX_GROUP_NAME = 64
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
    widths = (BITS, SYMMETRIC_BITS)

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
        """Return the tensors of one linear; without zero points they must all be 8 (128)."""
        import torch

        stores_zero = zero_point and linear.bits != SYMMETRIC_BITS
        for size, side in ((linear.out_features, "output"), (linear.in_features, "input")):
            # A head's outputs, as many as the vocabulary is large, may be any number.
            if size % PER_WORD and (side == "input" or stores_zero):
                raise VilaDeployError(
                    f"{size} {side} channels don't fill words of {PER_WORD}",
                    where="weight_packed",
                    fix="only linears of such sizes fit compressed-tensors here; choose another "
                    "format",
                )
        check_bits(linear, "compressed-tensors", self.widths)
        no_prequant_scale(linear, "compressed-tensors")
        tensors = {
            "weight_packed": pack_words(linear.q, bits=linear.bits),
            "weight_scale": linear.scale,
            "weight_shape": torch.tensor([linear.out_features, linear.in_features]),
        }
        if stores_zero:
            tensors["weight_zero_point"] = pack_words(linear.zero.T).T.contiguous()
        elif not linear.symmetric:
            raise VilaDeployError(
                f"must all be {symmetric_zero(linear.bits)} in a symmetric quantization",
                where="zero points",
                fix="correct zero_point in quantization_config",
            )
        if linear.bias is not None:
            tensors["bias"] = linear.bias.half()
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], group_size: int, bits: int = BITS
    ) -> QuantizedLinear:
        """Return what `pack` or compressed-tensors wrote, bit for bit; scales may be bfloat16.

        Raises:
            VilaDeployError: a tensor is missing, its dtype, shape or content doesn't fit the
                others, or a bfloat16 scale that float16 can't hold.
        """
        import torch

        words = stored(tensors, "weight_packed")
        per_word = 32 // bits
        if words.ndim != 2 or group_size < 1 or words.shape[1] * per_word % group_size:
            raise _unfit(
                "weight_packed", f"{list(words.shape)} does not hold groups of {group_size}"
            )
        rows, columns = words.shape[0], words.shape[1] * per_word
        packed_zero = tensors.get("weight_zero_point")
        specs = self.tensor_specs(rows, columns, group_size, bits, packed_zero is not None)
        check_stored(tensors, (*specs, TensorSpec("bias", (rows,), FLOATS)), FIX)
        shape = tensors["weight_shape"].tolist()
        if shape != [rows, columns]:
            raise _unfit("weight_shape", f"says {shape}, weight_packed holds {[rows, columns]}")
        if packed_zero is None:
            groups = columns // group_size
            zero = torch.full((rows, groups), symmetric_zero(bits), dtype=torch.uint8)
        else:
            zero = unpack_words(packed_zero.T, bits=bits).T.contiguous()
        bias = tensors.get("bias")
        return QuantizedLinear(
            q=unpack_words(words, bits=bits),
            scale=_exact_float16(tensors["weight_scale"]),
            zero=zero,
            bias=None if bias is None else bias.half(),
            bits=bits,
        )

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        """Return the `quantization_config` that transformers, vLLM and SGLang look for."""
        groups = [_config_group(["Linear"], replace(scheme, linear_bits={}))]
        for bits in sorted(scheme.widths - {scheme.bits}):
            names = [name for name, width in scheme.linear_bits.items() if width == bits]
            groups.append(_config_group(names, scheme.of(names[0])))
        return {
            "quant_method": self.quant_method,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
            "ignore": [] if HEAD_LINEAR in scheme.linear_bits else [HEAD_LINEAR],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def warning(self, scheme: QuantScheme) -> str | None:
        if not scheme.linear_bits or scheme.symmetric:
            return None
        return (
            "transformers 5.23 loads linears in several numbers of bits only without zero points; "
            "for it, quantize with --symmetric"
        )

    def read_config(self, fields: Fields) -> QuantizationConfig:
        """Return integers in groups, in 4 bits but for linears that a second group names."""
        fields.choice("format", (FORMAT,), what="compressed-tensors format")
        for key in ("kv_cache_scheme", "transform_config"):
            if fields.values.get(key):
                raise fields.error(key, "is not supported", "quantize without it")
        groups = fields.child("config_groups")
        several = len(groups.values) > 1
        if any(len(name) > MAX_GROUP_NAME for name in groups.values):
            raise fields.error("config_groups", f"has a name of more than {MAX_GROUP_NAME} letters")
        read = [_read_group(groups.child(name), several) for name in sorted(groups.values)]
        general = [scheme for scheme, names in read if not names]
        if len(general) != 1 or general[0].bits != BITS:
            raise fields.error(
                "config_groups",
                f"must be one for all linears, of {BITS} bits, and others that name theirs, found "
                f"{short(sorted(groups.values))}",
            )
        linear_bits: dict[str, int] = {}
        for scheme, names in read:
            if scheme.group_size != general[0].group_size:
                raise fields.error("config_groups", "must have groups of one size")
            if names and (scheme.bits != SYMMETRIC_BITS or not scheme.symmetric):
                raise fields.error(
                    "config_groups", f"must be in {SYMMETRIC_BITS} bits, symmetric, where named"
                )
            for name in names:
                if name in linear_bits:
                    raise fields.error("config_groups", f"names {name} twice")
                linear_bits[name] = scheme.bits
        return QuantizationConfig(
            quant_method=self.quant_method,
            bits=BITS,
            group_size=general[0].group_size,
            zero_point=not general[0].symmetric,
            version=self.version,
            linear_bits=linear_bits,
        )


def _config_group(targets: list[str], scheme: QuantScheme) -> dict[str, Any]:
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
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def _read_group(group: Fields, several: bool) -> tuple[QuantScheme, tuple[str, ...]]:
    """Return a group's scheme, and the linears that it names; none where it is for all others.

    Args:
        several: there are other groups; of a single one, the tensors tell what it is for.
    """
    if "input_activations" in group:
        raise group.error("input_activations", "only weights may be quantized")
    weights = group.child("weights")
    weights.choice("type", ("int",), "int", what="type of quantized values")
    weights.choice("strategy", ("group",), what="strategy")
    order = weights.values.get("actorder")
    if order not in PLAIN_ORDERS:
        raise weights.error("actorder", f"{short(order)} moves columns, which is not supported")
    bits = weights.integer("num_bits", low=BITS, high=SYMMETRIC_BITS if several else BITS)
    if bits not in PackQuantized.widths:
        raise weights.error("num_bits", f"must be {BITS} or {SYMMETRIC_BITS}, found {bits}")
    scheme = QuantScheme(
        weights.integer("group_size", low=1), weights.boolean("symmetric", True), bits
    )
    targets = group.values.get("targets")
    if targets == ["Linear"] or not several:
        return scheme, ()
    names = targets if isinstance(targets, list) else []
    known = (isinstance(name, str) and LINEAR.fullmatch(name) for name in names)
    if not 0 < len(names) <= MAX_TARGETS or not all(known):
        raise group.error("targets", f"must be Linear or names of linears, found {short(targets)}")
    return scheme, tuple(names)


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
