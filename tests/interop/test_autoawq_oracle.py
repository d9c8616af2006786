"""AutoAWQ 0.2.9 loads our AutoAWQ GEMM with its own reader on a CPU: the same weights and tokens.

Needs its own environment: autoawq 0.2.9 --no-deps, transformers 4.51.3, accelerate, datasets, and
no triton, whose kernels it would want a GPU for. Its transformers can't make SmolLM2's checkpoint:
SMOLLM2_VILA=FOLDER has one that tests/support/smollm2.py wrote in the ordinary environment.
"""

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

awq = pytest.importorskip("awq", reason="AutoAWQ is only in an environment of its own")


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", MODELS)
def test_autoawq_reads_it(
    name: str, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awq.utils.packing_utils import dequantize_gemm

    root = make_model(name, tmp_path / "root")
    out = round_checkpoint(root, tmp_path / "out", ["awq"], QuantScheme(64, symmetric))
    checkpoint = open_checkpoint(out)
    ids = prompt_ids(out / "llm")
    # Or it would insist on Intel's kernel; this way it takes the plain one.
    monkeypatch.setattr("awq.models.base.get_best_device", lambda: "cuda:0")
    theirs = awq.AutoAWQForCausalLM.from_quantized(
        str(out / "llm"), fuse_layers=False, device_map={"": "cpu"}
    ).model.eval()
    modules = dict(theirs.named_modules())
    weights = {full: linear.dequantize() for full, linear in linears(checkpoint).items()}
    for full, weight in weights.items():
        # They multiply in the scales' float16.
        m = modules[full]
        found = dequantize_gemm(m.qweight, m.qzeros, m.scales, m.w_bit, m.group_size)
        assert torch.equal(found.T, weight.half()), full
    weights = {full: weight.half().float() for full, weight in weights.items()}
    reference = reference_model(checkpoint, weights)
    with torch.no_grad():
        ours = reference(ids).logits.float()
        assert (theirs(ids).logits.float() - ours).abs().max() < 0.02 * ours.abs().max()
    if name == "SmolLM2":
        # Theirs computes in float16, which decides otherwise where two tokens are close.
        assert greedy(theirs, ids) == greedy(reference.half(), ids)
