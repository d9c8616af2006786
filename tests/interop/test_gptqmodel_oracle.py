"""transformers with GPTQModel loads our AutoAWQ GEMM on a CPU: the same weights and tokens."""

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

pytest.importorskip("gptqmodel", reason="pip install '.[interop]' to test against this tool")


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it(name: str, symmetric: bool, tmp_path: Path) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoModelForCausalLM, AwqConfig

    root = make_model(name, tmp_path / "root")
    out = round_checkpoint(root, tmp_path / "out", ["awq"], QuantScheme(64, symmetric))
    checkpoint = open_checkpoint(out)
    ids = prompt_ids(out / "llm")
    options = AwqConfig(backend="torch_awq")
    theirs = AutoModelForCausalLM.from_pretrained(
        out / "llm", dtype=torch.float16, device_map="cpu", quantization_config=options
    ).eval()
    modules = dict(theirs.named_modules())
    weights = {full: linear.dequantize() for full, linear in linears(checkpoint).items()}
    for full, weight in weights.items():
        # They multiply in the scales' float16.
        m = modules[full]
        found = dequantize_gemm(
            qweight=m.qweight, qzeros=m.qzeros, scales=m.scales, bits=4, group_size=64
        )
        assert torch.equal(found.T, weight.half()), full
    weights = {full: weight.half().float() for full, weight in weights.items()}
    reference = reference_model(checkpoint, weights)
    with torch.no_grad():
        ours = reference(ids).logits.float()
        assert (theirs(ids).logits.float() - ours).abs().max() < 0.02 * ours.abs().max()
    if name == "SmolLM2":
        # Theirs computes in float16, which decides otherwise where two tokens are close.
        assert greedy(theirs, ids) == greedy(reference.half(), ids)
