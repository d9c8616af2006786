"""Phases of one launch, tiles dealt out over its programs, against one launch each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import (
    CAPABILITY,
    EPSILON,
    generator,
    halves,
    random_packed,
    unwritten,
)
from vila_deploy.kernels import fused_layer as module
from vila_deploy.kernels.add_residual import add_residual
from vila_deploy.kernels.capability import INTERPRETER
from vila_deploy.kernels.fused_layer import fused_layer
from vila_deploy.kernels.gate_up import gate_up
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.norm_qkv import norm_qkv
from vila_deploy.kernels.packed_linear import interleave
from vila_deploy.kernels.tile_config import gemv_programs

HIDDEN, INNER, QKV = 64, 128, 96  # 4, 8, 4 and 6 tiles


def layer(bits: int) -> tuple[list[Launch], list[Tensor]]:
    """From o_proj to the next layer's q, k and v; what they write."""
    random = generator(bits)

    def weight(rows: int, columns: int) -> Any:
        return random_packed(rows, columns, bits, random, 64)

    attended, norms = halves(1, HIDDEN, random), torch.rand(2, HIDDEN, generator=random)
    residual = torch.randn(1, HIDDEN, generator=random)
    x, inner, qkv = (unwritten(1, columns) for columns in (HIDDEN, INNER, QKV))
    squares = unwritten(gemv_programs(CAPABILITY, HIDDEN), 8, dtype=torch.float32)
    bias = torch.randn(QKV, generator=random)
    pair = interleave(weight(INNER, HIDDEN), weight(INNER, HIDDEN))
    launches = [
        add_residual(attended, weight(HIDDEN, HIDDEN), norms[0], residual, x, squares, CAPABILITY),
        gate_up(x, squares, pair, inner, EPSILON, 2.0, CAPABILITY),
        add_residual(inner, weight(HIDDEN, INNER), norms[1], residual, x, squares, CAPABILITY),
        norm_qkv(x, squares, weight(QKV, HIDDEN), bias, qkv, EPSILON, 1.0, CAPABILITY),
    ]
    return launches, [residual, x, squares, inner, qkv]


@pytest.mark.parametrize(("bits", "programs"), [(4, 3), (16, 1)])
def test_has_the_bits_of_separate_launches(
    bits: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERPRETED_PROGRAMS", programs)
    alone, expected = layer(bits)
    for launch in alone:
        launch()
    launches, found = layer(bits)
    phases = fused_layer(launches, torch.zeros(1, dtype=torch.int32), INTERPRETER)
    assert [(phase.grid, phase.constants["FIRST"]) for phase in phases] == [
        ((programs,), first) for first in range(4)
    ]
    for phase in phases:
        phase()
    for left, right in zip(found, expected, strict=True):
        assert left.isfinite().all()
        assert torch.equal(left, right)


def test_a_gpu_runs_all_phases_in_one_launch() -> None:
    launches, _ = layer(4)
    (whole,) = fused_layer(launches, torch.zeros(1, dtype=torch.int32), CAPABILITY)
    assert whole.constants == {"FIRST": 0, "LAST": 4}
    assert whole.grid == (264,)
    assert whole.args["tiles"] == (4, 8, 4, 6)
    assert whole.options == {"launch_cooperative_grid": True}
