"""Every kernel of an engine compiles for every target without a GPU, and none spills."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vila_deploy.kernels.aot import parse_usage

from vila_deploy.backends.native.compile import compile_engine
from vila_deploy.model.presets import preset

# Shared memory that a program may have, in bytes: CUDA's documented limits.
SHARED_BYTES = {"8.0": 163 << 10, "8.7": 163 << 10, "8.9": 99 << 10, "9.0": 227 << 10}
KERNELS = {
    "embed_kernel", "norm_qkv_kernel", "rope_kv_kernel", "attention_part_kernel",
    "attention_merge_kernel", "add_residual_kernel", "gate_up_kernel", "head_kernel", "pick_kernel",
    "gemm_kernel", "dequantize_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    """One layer of VILA1.5-3b: int4 linears, and lm_head for the kernels' float16 form."""
    config = replace(preset("VILA1.5-3b", "int4").llm, num_layers=1)
    return compile_engine(config, 1024, list(SHARED_BYTES))


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_all_kernels_compile_and_none_spills(report: list[dict[str, Any]], capability: str) -> None:
    rows = [row for row in report if row["sm"] == int(capability.replace(".", ""))]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_BYTES[capability], row
    bits = {row["kernel"]: row["constants"].get("BITS") for row in rows}
    assert (bits["norm_qkv_kernel"], bits["head_kernel"]) == (4, 16)


def test_what_a_spilling_kernel_looks_like() -> None:
    report = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function kernel:\n"
        "  REG:255 STACK:48 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    assert parse_usage(report) == (255, 48)
