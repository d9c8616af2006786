"""Engines of the native backend for tests, in Triton's interpreter; import this before kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vila_deploy.backends.native import build as build_module
from vila_deploy.backends.native.weights import Layer, PackedLlm, pack_shards
from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits, Manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.engine.target import Target, get_target
from vila_deploy.formats.base import QuantScheme
from vila_deploy.formats.rtn import round_to_nearest
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch_mode import AUTOMATIC, possible_modes

MAX_SEQ_LEN, GROUP = 160, 128
# Of the logits' spread; float16 activations differ by 2e-3 to 7e-3 here.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Rounded:
    """A float WeightSource whose decoder linears are rounded to 4 bits."""

    source: Any

    def tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name)

    def linear(self, prefix: str) -> Any:
        return round_to_nearest(self.source.linear(prefix).float(), QuantScheme(GROUP))


def rounded(checkpoint: Any) -> Any:
    quantization = QuantizationConfig("awq", 4, GROUP, True, "gemm")
    config = checkpoint.config
    return SimpleNamespace(
        config=replace(config, llm=replace(config.llm, quantization=quantization)),
        llm=Rounded(checkpoint.llm), vision=checkpoint.vision, projector=checkpoint.projector,
    )  # fmt: skip


def built(
    folder: Path,
    checkpoint: Any,
    monkeypatch: pytest.MonkeyPatch,
    max_seq_len: int = MAX_SEQ_LEN,
    module_precision: ModulePrecision = ALL_FP16,
    target: Target | None = None,
    kernel_launch: str | None = None,
) -> Manifest:
    """Build without compiling, which test_aot.py does."""
    asked: list[Any] = []
    monkeypatch.setattr(build_module, "compile_engine", lambda *args: asked.append(args) or [])
    folder.mkdir()
    limits = Limits(1, max_seq_len, max_seq_len)
    request = BuildRequest(
        target or get_target("h100"),
        limits,
        module_precision=module_precision,
        kernel_launch=kernel_launch,
    )
    weights = ModelWeights(checkpoint.llm, checkpoint.vision, checkpoint.projector)
    found = build_module.build(folder, checkpoint.config, weights, request)
    capability = ComputeCapability(9, 0)
    modes = possible_modes(kernel_launch or AUTOMATIC, capability)
    assert asked == [(checkpoint.config.llm, max_seq_len, [capability], module_precision, modes)]
    return Manifest(
        name="tiny", target="h100", backend="native", precision="int4", weights="trained",
        weight_bytes_per_token=found.weight_bytes_per_token, checkpoint_fingerprint=None,
        limits=request.limits, model=ModelInfo.from_config(checkpoint.config, None),
        versions=found.versions,
        module_precision=module_precision,
    )  # fmt: skip


def pack_llm(config: LlmConfig, weights: Any, max_seq_len: int) -> PackedLlm:
    """Return a decoder with all its layers in memory."""
    *layers, rest = pack_shards(config, weights, max_seq_len, lambda name: None)
    assert isinstance(rest, PackedLlm)
    return replace(rest, layers=tuple(layer for layer in layers if isinstance(layer, Layer)))


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())
