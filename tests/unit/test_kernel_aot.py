"""Every kernel of an engine compiles for every target without a GPU, and none spills."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vila_deploy.kernels.aot import parse_usage

from vila_deploy.backends.native.compile import compile_engine
from vila_deploy.engine.components import Components
from vila_deploy.model.presets import preset

# Shared memory that a program may have, in bytes: CUDA's documented limits.
SHARED_BYTES = {"8.0": 163 << 10, "8.7": 163 << 10, "8.9": 99 << 10, "9.0": 227 << 10}
KERNELS = {
    "embed_kernel", "norm_qkv_kernel", "rope_kv_kernel", "attention_part_kernel",
    "attention_merge_kernel", "add_residual_kernel", "gate_up_kernel", "head_kernel", "pick_kernel",
    "gemm_kernel", "dequantize_kernel", "sample_kernel",
}  # fmt: skip


CONFIG = replace(preset("VILA1.5-3b", "int4").llm, num_layers=1)
Rows = list[dict[str, Any]]


def check(rows: Rows, kernels: set[str]) -> None:
    assert {(row["kernel"], row["sm"]) for row in rows} == {
        (kernel, int(capability.replace(".", "")))
        for kernel in kernels
        for capability in SHARED_BYTES
    }
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        major, minor = divmod(row["sm"], 10)
        assert row["shared_bytes"] <= SHARED_BYTES[f"{major}.{minor}"], row


def constants(rows: Rows, kernel: str, name: str) -> set[Any]:
    return {row["constants"][name] for row in rows if row["kernel"] == kernel}


def test_all_kernels_compile_and_none_spills() -> None:
    """One layer of VILA1.5-3b: int4 linears, and lm_head for the kernels' float16 form."""
    rows = compile_engine(CONFIG, 1024, list(SHARED_BYTES))
    check(rows, KERNELS)
    assert constants(rows, "norm_qkv_kernel", "BITS") == {4}
    assert constants(rows, "head_kernel", "BITS") == {16}
    assert constants(rows, "attention_part_kernel", "TURN") == {True, False}


def test_quantized_components_compile_and_none_spills() -> None:
    """An int4 head is left out: it is the loop of the int4 linears."""
    kernels = {"head_kernel", "rope_kv_kernel", "attention_part_kernel"}
    components = Components(lm_head="int8", kv_cache="int8")
    rows = compile_engine(CONFIG, 1024, list(SHARED_BYTES), components, sorted(kernels))
    check(rows, kernels)
    assert constants(rows, "head_kernel", "BITS") == {8}
    for kernel in ("rope_kv_kernel", "attention_part_kernel"):
        assert constants(rows, kernel, "INT8") == {True}


def test_what_a_spilling_kernel_looks_like() -> None:
    report = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function kernel:\n"
        "  REG:255 STACK:48 SHARED:0 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    )
    assert parse_usage(report) == (255, 48)
