"""`quantization_config` of a 4-bit llm/: which format its tensors are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.checkpoint.tinychat_file import VERSION as TINYCHAT
from vila_deploy.checkpoint.tinychat_file import group_size, tinychat_file
from vila_deploy.utils.errors import short

TRTLLM = "trtllm"  # QuantizationConfig.version of TensorRT-LLM's checkpoint
PACKED = "pack-quantized"  # QuantizationConfig.version of compressed-tensors
# Orders in which GPTQ may have treated the columns without storing them in another.
PLAIN_ORDERS = (None, False, "weight", "static")


@dataclass(frozen=True)
class QuantizationConfig:
    """`version` is the layout of the tensors: gemm, tinychat-v2, pack-quantized or trtllm."""

    quant_method: str
    bits: int
    group_size: int
    zero_point: bool
    version: str


def load_quantization(fields: Fields) -> QuantizationConfig | None:
    """What the config says of a quantization; None if there is none.

    Raises:
        VilaDeployError: names the key whose value is none that this version reads.
    """
    if "quantization_config" not in fields:
        # AWQ releases of VILA say nothing here: their one file of weights does.
        file = tinychat_file(fields.source.parent)
        return QuantizationConfig("awq", 4, group_size(file), True, TINYCHAT) if file else None
    child = fields.child("quantization_config")
    return METHODS[child.choice("quant_method", METHODS, what="quantization method")](child)


def _awq(fields: Fields) -> QuantizationConfig:
    return QuantizationConfig(
        quant_method="awq",
        bits=fields.integer("bits", low=4, high=4),
        group_size=fields.integer("group_size", low=1),
        # Our own key, for readers that know AWQ GEMM with zero points only.
        zero_point=fields.boolean("zero_point", True) and not fields.boolean("symmetric", False),
        version=fields.choice("version", ("gemm", "GEMM"), "gemm", what="AWQ layout").lower(),
    )


def _compressed_tensors(fields: Fields) -> QuantizationConfig:
    """4-bit integers in groups for all linears alike; which ones, the tensors tell."""
    fields.choice("format", (PACKED,), what="compressed-tensors format")
    groups = fields.child("config_groups")
    if len(groups.values) != 1:
        raise fields.error(
            "config_groups", f"must be one for all linears, found {short(sorted(groups.values))}"
        )
    for key in ("kv_cache_scheme", "transform_config"):
        if fields.values.get(key):
            raise fields.error(key, "is not supported", "quantize without it")
    group = groups.child(next(iter(groups.values)))
    if "input_activations" in group:
        raise group.error("input_activations", "only weights may be quantized")
    weights = group.child("weights")
    weights.choice("type", ("int",), "int", what="type of levels")
    weights.choice("strategy", ("group",), what="strategy")
    order = weights.values.get("actorder")
    if order not in PLAIN_ORDERS:
        raise weights.error("actorder", f"{short(order)} moves columns, which is not supported")
    return QuantizationConfig(
        quant_method="compressed-tensors",
        bits=weights.integer("num_bits", low=4, high=4),
        group_size=weights.integer("group_size", low=1),
        zero_point=not weights.boolean("symmetric", True),
        version=PACKED,
    )


def _trtllm(fields: Fields) -> QuantizationConfig:
    """Ours, for a checkpoint whose 4-bit linears lie in trtllm/ as TensorRT-LLM reads them."""
    return QuantizationConfig(
        quant_method="trtllm",
        bits=fields.integer("bits", low=4, high=4),
        group_size=fields.integer("group_size", low=1),
        zero_point=fields.boolean("zero_point", False),
        version=TRTLLM,
    )


METHODS: dict[str, Callable[[Fields], QuantizationConfig]] = {
    "awq": _awq,
    "trtllm": _trtllm,
    "compressed-tensors": _compressed_tensors,
}
