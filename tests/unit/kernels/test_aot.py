"""Every kernel of an engine compiles for every target without a GPU, and none spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.support.paths import REPOSITORY
from vila_deploy.backends.native.compile import compile_engine
from vila_deploy.checkpoint.presets import preset
from vila_deploy.kernels.aot import parse_usage
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.tile_config import device

PROBE = REPOSITORY / "tests" / "support" / "kernel_probe.py"
# Shared memory that a program may have, in bytes: CUDA's documented limits.
SHARED_BYTES = {
    ComputeCapability(8, 0): 163 << 10,
    ComputeCapability(8, 7): 163 << 10,
    ComputeCapability(8, 9): 99 << 10,
    ComputeCapability(9, 0): 227 << 10,
}
KERNELS = {
    "embed_kernel", "norm_qkv_kernel", "rope_kv_kernel", "attention_split_kernel",
    "attention_merge_kernel", "add_residual_kernel", "gate_up_kernel", "head_kernel",
    "argmax_kernel", "gemm_kernel", "dequantize_kernel", "sample_kernel",
    "prompt_attention_kernel", "prompt_norm_kernel", "swiglu_kernel",
}  # fmt: skip

# What only a prompt or a step of several tokens launches, or a step without PDL.
NOT_IN_A_STEP = {
    "rope_kv_kernel", "gemm_kernel", "dequantize_kernel", "attention_split_kernel",
    "attention_merge_kernel", "prompt_attention_kernel", "prompt_norm_kernel", "swiglu_kernel",
}  # fmt: skip
# Of a multiprocessor: CUDA's documented limits.
REGISTERS = 1 << 16
ALL_SHARED_BYTES = {80: 164 << 10, 87: 164 << 10, 89: 100 << 10, 90: 228 << 10}

CONFIG = replace(preset("VILA1.5-3b", "int4").llm, num_layers=1)
Rows = list[dict[str, Any]]


def check(rows: Rows, kernels: set[str]) -> None:
    assert {(row["kernel"], row["sm"]) for row in rows} == {
        (kernel, capability.sm) for kernel in kernels for capability in SHARED_BYTES
    }
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_BYTES[capability_of(row)], row


def capability_of(row: dict[str, Any]) -> ComputeCapability:
    return ComputeCapability(*divmod(row["sm"], 10))


def constants(rows: Rows, kernel: str, name: str) -> set[Any]:
    return {row["constants"][name] for row in rows if row["kernel"] == kernel}


def test_all_kernels_compile_and_none_spills() -> None:
    """One layer of VILA1.5-3b: int4 linears, and lm_head for the kernels' float16 form."""
    rows = compile_engine(CONFIG, 1024, list(SHARED_BYTES))
    check(rows, KERNELS)
    assert constants(rows, "norm_qkv_kernel", "BITS") == {4}
    assert constants(rows, "head_kernel", "BITS") == {16}
    assert constants(rows, "attention_split_kernel", "ROPE") == {True, False}


@pytest.fixture(scope="module")
def probed() -> dict[str, Rows]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROBE], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_quantized_components_compile_and_none_spills(probed: dict[str, Rows]) -> None:
    """An int4 head is left out: it is the loop of the int4 linears."""
    rows = probed["small"]
    check(rows, {"head_kernel", "rope_kv_kernel", "attention_split_kernel"})
    assert constants(rows, "head_kernel", "BITS") == {8}
    for kernel in ("rope_kv_kernel", "attention_split_kernel"):
        assert constants(rows, kernel, "INT8") == {True}


def test_on_a_gpu_arguments_are_what_they_were_compiled_for(probed: dict[str, Rows]) -> None:
    """Up to where Triton would compile: names that it keeps for itself are refused there."""
    rows = probed["bound"]
    assert {row["kernel"] for row in rows} == KERNELS | {"attention_kernel", "fused_layer_kernel"}
    for row in rows:
        assert all(row[key] for key in ("signature", "constants", "attributes", "hash", "warps")), (
            row
        )
    chosen = {row["kernel"]: row["options"] for row in rows if row["options"]}
    assert chosen.pop("fused_layer_kernel") == ["launch_cooperative_grid"]
    assert set(chosen) == KERNELS - NOT_IN_A_STEP | {"attention_kernel"}
    assert all(options == ["launch_pdl"] for options in chosen.values())


def test_kernels_with_pdl_wait_once_behind_their_prefetches(probed: dict[str, Rows]) -> None:
    rows = [row for row in probed["modes"] if row["kernel"] != "fused_layer_kernel"]
    assert {row["pdl"] for row in rows} == {True, False}
    for row in rows:
        assert row["stack_bytes"] == 0, row
        counts, places = row["counts"], row["places"]
        on = int(row["pdl"])
        assert counts["griddepcontrol.wait"] == counts["griddepcontrol.launch_dependents"] == on
        assert (counts["prefetch.global.L2"] > 0) == row["pdl"]
        if on:
            assert row["last_prefetch"] < places["griddepcontrol.wait"] < places["cp.async"]
            # Attention reads the position before, to know what of the cache to ask for.
            loads_early = row["kernel"] == "attention_kernel"
            assert loads_early or places["griddepcontrol.wait"] < places["ld.global"]


def test_programs_of_a_fused_layer_fit_on_the_device(probed: dict[str, Rows]) -> None:
    """All of them at once, or they would wait for each other forever."""
    rows = [row for row in probed["modes"] if row["kernel"] == "fused_layer_kernel"]
    assert {row["sm"] for row in rows} == set(ALL_SHARED_BYTES)
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert row["counts"]["ld.acquire.gpu"] == row["counts"]["atom.global.gpu.acq_rel"] == 3
        programs, rest = divmod(row["programs"], device(capability_of(row)).processors)
        assert rest == 0
        # Registers are given out 256 at a time to a warp; each program takes 1 KB more.
        warp = -(-row["registers"] * 32 // 256) * 256
        assert programs * row["warps"] * warp <= REGISTERS
        assert programs * (row["shared_bytes"] + 1024) <= ALL_SHARED_BYTES[row["sm"]]


def test_what_a_spilling_kernel_looks_like() -> None:
    report = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function kernel:\n"
        "  REG:255 STACK:48 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    assert parse_usage(report) == (255, 48)
