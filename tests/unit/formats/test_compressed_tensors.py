"""compressed-tensors' pack-quantized layout: there and back, and as its own tool writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.paths import GOLDEN
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.compressed_tensors import PACK_QUANTIZED
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.convert import convert

PREFIX = "model.layers.0.self_attn.q_proj"
GOLDEN = json.loads((GOLDEN / "compressed_tensors.json").read_text())


def random_linear(rows: int, columns: int, group: int, symmetric: bool) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows)
    values = {"low": 0, "high": 16, "generator": generator, "dtype": torch.uint8}
    zero = torch.randint(size=(rows, columns // group), **values)
    return QuantizedLinear(
        q=torch.randint(size=(rows, columns), **values),
        scale=torch.rand(rows, columns // group, generator=generator).half(),
        zero=torch.full_like(zero, 8) if symmetric else zero,
        bias=torch.randn(rows, generator=generator).half(),
    )


def nibbles(words: Tensor) -> np.ndarray:
    """Eight values for each word of the last dimension, low bits first, from its bytes."""
    octets = words.contiguous().numpy().view(np.uint8)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*words.shape[:-1], -1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_there_and_back(symmetric: bool) -> None:
    linear = random_linear(24, 128, 32, symmetric)
    tensors = PACK_QUANTIZED.pack(linear, not symmetric)
    assert ("weight_zero_point" in tensors) != symmetric
    back = PACK_QUANTIZED.unpack(tensors, 32)
    for field in ("q", "scale", "zero", "bias"):
        assert torch.equal(getattr(back, field), getattr(linear, field)), field
    assert (nibbles(tensors["weight_packed"]) == linear.q.numpy()).all()
    if not symmetric:
        assert (linear.zero.numpy() == nibbles(tensors["weight_zero_point"].T).T).all()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"symmetric={case['symmetric']}")
def test_what_compressed_tensors_itself_packed(case: dict[str, Any]) -> None:
    """Numbers that version 0.20 wrote of given values; see tests/interop."""
    linear = QuantizedLinear(
        q=torch.tensor(case["q"], dtype=torch.uint8),
        scale=torch.tensor(case["scale"]).half(),
        zero=torch.tensor(case["zero"], dtype=torch.uint8),
    )
    tensors = PACK_QUANTIZED.pack(linear, not case["symmetric"])
    assert tensors.keys() == case["tensors"].keys()
    for name, (dtype, values) in case["tensors"].items():
        assert str(tensors[name].dtype) == dtype
        assert torch.equal(tensors[name], torch.tensor(values).to(tensors[name].dtype)), name


def test_a_checkpoint_says_what_its_readers_look_for(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True)
    convert(root, tmp_path / "out", ["compressed-tensors"])
    tensors = load_file(tmp_path / "out" / "llm" / "model.safetensors")
    shapes = {n.removeprefix(f"{PREFIX}."): t for n, t in tensors.items() if n.startswith(PREFIX)}
    assert {name: (str(t.dtype), list(t.shape)) for name, t in shapes.items()} == {
        "weight_packed": ("torch.int32", [128, 16]),
        "weight_scale": ("torch.float16", [128, 2]),
        "weight_zero_point": ("torch.int32", [16, 2]),
        "weight_shape": ("torch.int64", [2]),
    }
    config = json.loads((tmp_path / "out" / "llm" / "config.json").read_text())
    said = config["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    weights = said["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 64, False)
    found = open_checkpoint(tmp_path / "out").config.llm.quantization
    assert found is not None
    assert (found.group_size, found.zero_point) == (64, True)


def changed(root: Path, **changes: Tensor | None) -> Path:
    file = root / "llm" / "model.safetensors"
    tensors = load_file(file)
    for part, tensor in changes.items():
        name = f"{PREFIX}.{part}"
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})
    (root / "SHA256SUMS").unlink()
    return root


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_zero_point": None}, "weight_zero_point is missing"),
        ({"weight_scale": torch.ones(128, 4).half()}, r"\[128, 4\], config.json asks for \[128, 2"),
        ({"weight_shape": torch.tensor([128, 120])}, r"weight_shape: says \[128, 120\]"),
        ({"weight_scale": torch.full((128, 2), 1e9).bfloat16()}, "scales that float16 can't hold"),
    ],
)
def test_refuses_damage(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "q", quantized=True), tmp_path / "a", ["compressed-tensors"])
    with pytest.raises(VilaDeployError, match=message) as caught:
        open_checkpoint(changed(tmp_path / "a", **changes)).llm.linear(PREFIX)
    assert "\n" not in str(caught.value)


def test_reads_bfloat16_scales_that_float16_holds(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "q", quantized=True), tmp_path / "a", ["compressed-tensors"])
    scale = torch.full((128, 2), 0.0078125).bfloat16()
    linear = open_checkpoint(changed(tmp_path / "a", weight_scale=scale)).llm.linear(PREFIX)
    assert isinstance(linear, QuantizedLinear)
    assert torch.equal(linear.scale, torch.full((128, 2), 0.0078125).half())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "int-quantized", r"unknown compressed-tensors format 'int-quantized'"),
        (["config_groups"], {}, "must be one for all linears"),
        (["transform_config"], {"R1": {}}, "transform_config: is not supported"),
        (["config_groups", "group_0", "weights", "num_bits"], 8, "must be an integer in 4..4"),
        (["config_groups", "group_0", "weights", "actorder"], "group", "moves columns"),
        (["config_groups", "group_0", "input_activations"], {"num_bits": 8}, "only weights may be"),
        (["quant_method"], "gptq", "supports awq, compressed-tensors"),
    ],
)
def test_refuses_other_schemes(path: list[str], value: Any, message: str, tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "q", quantized=True), tmp_path / "a", ["compressed-tensors"])
    file = tmp_path / "a" / "llm" / "config.json"
    config = json.loads(file.read_text())
    inner = config["quantization_config"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(config))
    with pytest.raises(VilaDeployError, match=message):
        open_checkpoint(tmp_path / "a")


def test_a_symmetric_claim_must_hold() -> None:
    with pytest.raises(VilaDeployError, match="must all be 8"):
        PACK_QUANTIZED.pack(random_linear(8, 32, 32, symmetric=False), zero_point=False)
