"""GGUF's blocks and headers beside those of gguf-py, llama.cpp's own package."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from tests.support.damage import is_refused
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.gguf import GGUF_BLOCKS
from vila_deploy.formats.gguf_blocks import dequantize_table, quantize_table
from vila_deploy.formats.gguf_file import (
    UINT16,
    Typed,
    header_bytes,
    place,
    read_header,
)
from vila_deploy.utils.errors import VilaDeployError

METADATA = {
    "general.architecture": "llama",
    "split.no": Typed(UINT16, 3),
    "a.number": 7,
    "a.float": 1e-5,
    "a.flag": True,
    "texts": ["<s>", "▁été", ""],
    "numbers": [1, -2, 3],
    "floats": [0.5, -1e6],
}


def random_linear(group_size: int, symmetric: bool) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(group_size)
    groups = (48, 512 // group_size)
    zero = torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8)
    # Every size of a float16: subnormal, negative and large ones too.
    exponent = torch.randint(-24, 11, groups, generator=generator).float()
    scale = (torch.rand(groups, generator=generator) + 0.5) * 2**exponent
    scale *= torch.randint(0, 2, groups, generator=generator) * 2 - 1
    return QuantizedLinear(
        q=torch.randint(0, 16, (48, 512), generator=generator, dtype=torch.uint8),
        scale=torch.where(scale.half() == 0, torch.ones_like(scale), scale).half(),
        zero=torch.full_like(zero, 8) if symmetric else zero,
    )


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_hold_the_weights_exactly(group_size: int, symmetric: bool) -> None:
    linear = random_linear(group_size, symmetric)
    blocks = GGUF_BLOCKS.pack(linear, zero_point=not symmetric)["blocks"]
    back = GGUF_BLOCKS.unpack({"blocks": blocks}, group_size)
    for field in ("q", "scale", "zero"):
        assert torch.equal(getattr(back, field), getattr(linear, field)), field
    kind = GGMLQuantizationType.Q4_0 if symmetric else GGMLQuantizationType.Q4_1
    found = torch.from_numpy(dequantize(blocks.flatten(1).numpy(), kind))
    if symmetric:
        assert torch.equal(found, linear.dequantize())
        return
    # The offset is rounded to float16, and nothing else.
    offset = (linear.zero.float() * linear.scale.float()).repeat_interleave(group_size, 1)
    rounding = (offset.half().float() - offset).abs() + 1e-6 * (15 * offset).abs()
    assert bool(((found - linear.dequantize()).abs() <= rounding).all())


def test_a_group_without_scale_reads_back_as_zeros() -> None:
    linear = random_linear(64, symmetric=False)
    linear.scale[3] = 0
    blocks = GGUF_BLOCKS.pack(linear)["blocks"]
    back = GGUF_BLOCKS.unpack({"blocks": blocks}, 64)
    assert torch.equal(back.dequantize(), linear.dequantize())
    assert int(back.zero[3].max()) == 0


@pytest.mark.parametrize("damage", ["scale", "offset", "groups"])
def test_values_that_no_quantization_gives_are_refused(damage: str) -> None:
    blocks = GGUF_BLOCKS.pack(random_linear(64, symmetric=False))["blocks"]
    half = blocks[..., :4].contiguous().view(torch.float16)
    if damage == "scale":
        half[0, :2, 0] = float("nan")
    elif damage == "offset":
        half[0, :2, 1] = half[0, :2, 0] * 0.3
    else:
        half[0, 1, 0] *= 2
    blocks[..., :4] = half.view(torch.uint8)
    with pytest.raises(VilaDeployError, match="blocks: has "):
        GGUF_BLOCKS.unpack({"blocks": blocks}, 64)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q6_K"])
def test_tables_are_what_gguf_py_reads(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1100, 512, generator=generator).half()
    table[5] = 0
    table[6, :40] = 0
    content = torch.cat(list(quantize_table(table, dtype)))
    kind = GGMLQuantizationType[dtype]
    theirs = torch.from_numpy(dequantize(content.numpy(), kind))
    found = dequantize_table(content, dtype)
    assert torch.equal(found, theirs)
    if dtype == "Q8_0":
        assert np.array_equal(content.numpy(), quantize(table.float().numpy(), kind))
    error = (found - table.float()).square().mean().sqrt() / table.float().square().mean().sqrt()
    # A step of a 16th of 3.2 standard deviations, or a 127th, evenly spread.
    assert float(error) < {"Q8_0": 0.006, "Q6_K": 0.022}[dtype]
    again = torch.cat(list(quantize_table(found, dtype)))
    assert torch.allclose(dequantize_table(again, dtype), found, atol=1e-2)


def write_file(path: Path) -> Path:
    tensors = place([("a", (2, 64), "Q4_0"), ("b", (3,), "F32"), ("c", (5, 7), "F16")])
    content = header_bytes(METADATA, tensors)
    path.write_bytes(content + bytes(tensors[-1].begin + tensors[-1].bytes))
    return path


def test_headers_are_what_gguf_py_reads(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.gguf")
    theirs, ours = GGUFReader(path), read_header(path)
    for key, value in METADATA.items():
        expected = value.value if isinstance(value, Typed) else value
        assert theirs.fields[key].contents() == pytest.approx(expected)
        assert ours.metadata[key] == pytest.approx(expected)
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert found.dtype == tensor.tensor_type.name
        assert (ours.start + found.begin, found.bytes) == (tensor.data_offset, tensor.n_bytes)


def test_damaged_headers_end_in_one_line(tmp_path: Path) -> None:
    good = write_file(tmp_path / "x.gguf").read_bytes()
    start = read_header(tmp_path / "x.gguf").start
    rng, refused, path = random.Random(0), 0, tmp_path / "y.gguf"
    for number in range(1000):
        content = bytearray(good)
        at = rng.randrange(start)
        kind = number % 4
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])
        elif kind == 2:
            del content[rng.randrange(len(content)) :]
        else:
            content[at:at] = rng.randbytes(rng.randint(1, 40))
        path.write_bytes(content)
        refused += is_refused(lambda: read_header(path))
    # The others change a value, a name or a key.
    assert refused > 500
