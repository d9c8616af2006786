"""Quantizing on a real GPU: the CPU's result within rounding, and twice the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import TINY_VILA
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.pipeline import quantize

# Mean KL of two roundings of the same quality; they differ in single levels.
RATIO = 1.3
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


def quantized(out: Path, device: str, algorithm: str) -> dict[str, Any]:
    options = QuantizeOptions(QuantScheme(64), algorithm, evaluate=True, device=device)
    return quantize(TINY_VILA, out, options)


@pytest.mark.parametrize("algorithm", ["awq-gptq", "awq", "rtn"])
def test_is_the_cpus_result_and_repeats_itself(tmp_path: Path, algorithm: str) -> None:
    reports = [quantized(tmp_path / name, name[:4], algorithm) for name in ("cuda", "cuda2")]
    assert reports[0]["device"] == "cuda"
    weights = [
        sorted((tmp_path / name / "llm").glob("*.safetensors")) for name in ("cuda", "cuda2")
    ]
    assert [f.read_bytes() for f in weights[0]] == [f.read_bytes() for f in weights[1]]
    on_cpu = quantized(tmp_path / "cpu", "cpu", algorithm)
    kl = [report["evaluation"]["quality"]["all"]["kl_mean"] for report in (reports[0], on_cpu)]
    assert max(kl) < RATIO * min(kl)
