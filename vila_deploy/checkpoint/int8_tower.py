"""Which linears of a vision tower are stored in int8: vision_tower/config.json.

The format is compressed-tensors' "int-quantized": a linear X has `X.weight` int8 [out, in] and
`X.weight_scale` [out, 1], and W = weight · scale. Its one config group names these linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vila_deploy.utils.errors import short
from vila_deploy.utils.fields import Fields

METHOD, FORMAT = "compressed-tensors", "int-quantized"
INT8_BITS = 8
# Behind the name of an int8 weight.
SCALE = "_scale"
MAX_TARGETS, MAX_NAME = 1 << 14, 120


def int8_config(linears: Sequence[str]) -> dict[str, Any]:
    """Return `quantization_config` of a tower with these linears in int8."""
    weights = {
        "num_bits": INT8_BITS,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": list(linears),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def read_int8_linears(fields: Fields) -> tuple[str, ...]:
    """Return the linears that vision_tower/config.json says are in int8; none where it is silent.

    Raises:
        VilaDeployError: names the key whose value is none that this version reads.
    """
    if "quantization_config" not in fields:
        return ()
    config = fields.child("quantization_config")
    config.choice("quant_method", (METHOD,), what="quantization method")
    config.choice("format", (FORMAT,), what="format of a vision tower")
    groups = config.child("config_groups")
    if len(groups.values) != 1:
        raise config.error("config_groups", f"must be one, found {len(groups.values)}")
    group = groups.child(next(iter(groups.values)))
    if "input_activations" in group:
        raise group.error("input_activations", "only weights may be quantized")
    weights = group.child("weights")
    weights.choice("type", ("int",), "int", what="type of quantized values")
    weights.choice("strategy", ("channel",), what="strategy")
    weights.integer("num_bits", low=INT8_BITS, high=INT8_BITS)
    if not weights.boolean("symmetric", True):
        raise weights.error("symmetric", "must be true")
    names = group.values.get("targets")
    if not isinstance(names, list) or not 0 < len(names) <= MAX_TARGETS:
        raise group.error("targets", f"must be names of linears, found {short(names)}")
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise group.error("targets", f"must be names of linears, found {short(name)}")
    if len(set(names)) < len(names):
        raise group.error("targets", "names a linear twice")
    return tuple(names)
