"""transformers with compressed-tensors loads what we write: the same weights and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.baseline_environment import (
    MODELS,
    greedy,
    linears,
    make_model,
    prompt_ids,
    reference_model,
    round_checkpoint,
)
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantScheme

compressed_tensors = pytest.importorskip(
    "compressed_tensors", reason="pip install '.[interop]' to test against this tool"
)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it(name: str, symmetric: bool, tmp_path: Path) -> None:
    """Unpacked while it is loaded; symmetric ones also in the first pass, which is the default.

    For zero points transformers 5.23 with compressed-tensors 0.20 has only the former: it makes
    room for unpacked zero points and then finds packed ones.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    root = make_model(name, tmp_path / "root")
    scheme = QuantScheme(64, symmetric)
    out = round_checkpoint(root, tmp_path / "out", ["compressed-tensors"], scheme)
    checkpoint = open_checkpoint(out)
    ids = prompt_ids(out / "llm")
    weights = {full: linear.dequantize() for full, linear in linears(checkpoint).items()}
    for dequantize in (True, False) if symmetric else (True,):
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        theirs = AutoModelForCausalLM.from_pretrained(
            out / "llm", dtype=torch.float32, **(options if dequantize else {})
        ).eval()
        if dequantize:
            # They multiply in the scales' float16.
            weights = {full: weight.half().float() for full, weight in weights.items()}
        else:
            weights = {full: linear.dequantize() for full, linear in linears(checkpoint).items()}
        reference = reference_model(checkpoint, weights)
        assert greedy(theirs, ids) == greedy(reference, ids)
        modules = dict(theirs.named_modules())
        for full, weight in weights.items():
            assert torch.equal(modules[full].weight.data, weight), full
        with torch.no_grad():
            assert torch.equal(theirs(ids).logits, reference(ids).logits)


def test_transformers_loads_several_numbers_of_bits(tmp_path: Path) -> None:
    """Each linear in its own bits, without zero points; with them 5.23 takes all for the same."""
    from transformers import AutoModelForCausalLM

    root = make_model("tiny", tmp_path / "root")
    others = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj")
    scheme = QuantScheme(32, True, linear_bits=dict.fromkeys(others, 8))
    out = round_checkpoint(root, tmp_path / "out", ["compressed-tensors"], scheme)
    checkpoint = open_checkpoint(out)
    found = linears(checkpoint)
    assert [full for full, linear in found.items() if linear.bits == 8] == [*others]
    theirs = AutoModelForCausalLM.from_pretrained(out / "llm", dtype=torch.float32).eval()
    ids = prompt_ids(out / "llm")
    weights = {full: linear.dequantize() for full, linear in found.items()}
    reference = reference_model(checkpoint, weights)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, reference(ids).logits)
    modules = dict(theirs.named_modules())
    for full, weight in weights.items():
        assert torch.equal(modules[full].weight.data, weight), full


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_their_compressor_makes_the_same_tensors(symmetric: bool, tmp_path: Path) -> None:
    """Their quantizer and packer, given our scales and zero points, write our file's tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    root = make_model("tiny", tmp_path / "root")
    scheme = QuantScheme(32, symmetric)
    out = round_checkpoint(root, tmp_path / "out", ["compressed-tensors"], scheme)
    checkpoint = open_checkpoint(out)
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for full, linear in linears(checkpoint).items():
        state = {
            "weight": linear.dequantize(),
            "weight_scale": linear.scale,
            "weight_zero_point": linear.zero.to(torch.int8) - 8,
        }
        made = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
        names = {n.removeprefix(f"{full}.") for n in checkpoint.llm.names() if n.startswith(full)}
        assert made.keys() == names
        for part, tensor in made.items():
            stored = checkpoint.llm.tensor(f"{full}.{part}")
            assert stored.dtype == tensor.dtype
            assert torch.equal(stored, tensor), f"{full}.{part}"
