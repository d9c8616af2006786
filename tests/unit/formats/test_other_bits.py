"""Linears in 5 and 8 bits: what formats hold them, beside gguf-py's reading of GGUF's blocks."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.compressed_tensors import PACK_QUANTIZED
from vila_deploy.formats.gguf import GGUF_BLOCKS, dtype
from vila_deploy.formats.registry import FORMATS
from vila_deploy.formats.rtn import round_to_nearest
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

NAME = "model.layers.1.self_attn.k_proj"


def linear(bits: int, symmetric: bool = False) -> QuantizedLinear:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(bits))
    return round_to_nearest(weight, QuantScheme(64, symmetric, bits).of("it"))


def same(first: QuantizedLinear, second: QuantizedLinear) -> bool:
    fields = ("q", "scale", "zero")
    equal = all(torch.equal(getattr(first, field), getattr(second, field)) for field in fields)
    return equal and first.bits == second.bits


@pytest.mark.parametrize(("bits", "symmetric"), [(5, False), (5, True), (8, False), (8, True)])
def test_gguf_holds_them_as_gguf_py_reads_them(bits: int, symmetric: bool) -> None:
    given = linear(bits, symmetric)
    assert int(given.q.max()) > 16 * (2 ** (bits - 4) - 1)
    blocks = GGUF_BLOCKS.pack(given, zero_point=not symmetric)["blocks"]
    assert same(GGUF_BLOCKS.unpack({"blocks": blocks}, 64, bits), given)
    kind = GGMLQuantizationType[dtype(not symmetric, bits)]
    theirs = torch.from_numpy(dequantize(blocks.flatten(1).numpy(), kind).copy())
    minimum = (-given.zero.float() * given.scale.float()).half().float()
    step = given.q.unflatten(1, (2, 64)).float() * given.scale.float()[..., None]
    with_minimum = (step + minimum[..., None]).flatten(1)
    assert torch.equal(theirs, given.dequantize() if given.symmetric else with_minimum)


def test_compressed_tensors_holds_8_bits() -> None:
    given = linear(8)
    assert given.symmetric
    tensors = PACK_QUANTIZED.pack(given)
    assert "weight_zero_point" not in tensors
    # Value i of a word lies in its bits 8i..8i+7; on little-endian computers in that order.
    assert tensors["weight_packed"].view(torch.uint8).tolist() == given.q.tolist()
    assert same(PACK_QUANTIZED.unpack(tensors, 64, 8), given)


@pytest.mark.parametrize("name", [*FORMATS])
def test_formats_say_which_bits_they_hold(name: str) -> None:
    packing = FORMATS[name].packing
    for bits in (5, 8):
        scheme = QuantScheme(64, True, linear_bits={NAME: bits})
        if bits in packing.widths:
            packing.check(scheme, {NAME: (128, 128)})
        else:
            with pytest.raises(VilaDeployError, match=f"found {bits} bits"):
                packing.check(scheme, {NAME: (128, 128)})


@pytest.mark.parametrize("name", ["compressed-tensors", "gguf"])
def test_a_config_names_the_linears(name: str) -> None:
    packing = FORMATS[name].packing
    scheme = QuantScheme(64, linear_bits={NAME: 8})
    values = packing.quantization_config(scheme)
    read = packing.read_config(Fields({**values}, "config.json"))
    assert read.scheme == scheme
    assert [read.scheme.of(n).bits for n in (NAME, "model.layers.0.self_attn.k_proj")] == [8, 4]


@pytest.mark.parametrize(
    ("targets", "bits", "message"),
    [
        (["re:.*"], 8, "must be Linear or names of linears"),
        ([NAME, 3], 8, "must be Linear or names of linears"),
        ([NAME], 5, "must be 4 or 8"),
        ([NAME], 4, "must be in 8 bits"),
        (["Linear"], 8, "must be one for all linears"),
    ],
)
def test_other_groups_are_refused(targets: list[object], bits: int, message: str) -> None:
    values = PACK_QUANTIZED.quantization_config(QuantScheme(64, linear_bits={NAME: 8}))
    group = values["config_groups"]["group_1"]
    group["targets"], group["weights"]["num_bits"] = targets, bits
    with pytest.raises(VilaDeployError, match=message):
        PACK_QUANTIZED.read_config(Fields(values, "config.json"))
