"""The GPU benchmark rehearsed on the CPU: every stage runs and every row says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import REPOSITORY
from vila_deploy.kernels.capability import INTERPRETER
from vila_deploy.kernels.launch_mode import LAUNCH_MODES

STEMS = {
    "gemv", "gemm", "dequantize", "norm_qkv", "rope_kv", "attention", "add_residual", "gate_up",
    "head", "embed", "rope_attention", "slots_attention", "kv_int8", "sample", "step",
    "prompt_attention", "prompt_norm", "swiglu",
}  # fmt: skip
ABSENT = {
    "tinychat int4",
    "marlin int4",
    "machete int4",
    "gemlite int4",
    "humming int4",
    "llama.cpp",
}
STEPS = (
    "3B int4", "3B int4, lm-head int4", "3B int4, kv-cache int8",
    "3B int4, lm-head int4, kv-cache int8", "3B fp16",
)  # fmt: skip


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # No baselines, whatever was brought here.
    environment["VILA_DEPLOY_BASELINES"] = os.devnull
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False,
    )  # fmt: skip


def test_rehearsal_goes_through_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run("--rehearse", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {row["label"] for row in rows} == {"rehearsed"}
    assert all(row["versions"]["triton"] and row["device"] for row in rows)
    checks = [row for row in rows if row["kind"] == "check"]
    assert {row["name"].split()[0] for row in checks} == STEMS
    assert all(row["agrees"] and row["error"] < row["limit"] for row in checks)
    kinds = {row["kind"] for row in rows}
    assert {
        "check", "stream", "step", "memory_limit", "product", "prefill", "lookup", "session",
        "machine",
    } <= kinds  # fmt: skip
    assert not [row for row in rows if row["kind"] == "failed"]
    skipped = {row["name"]: row["reason"] for row in rows if row["kind"] == "skipped"}
    assert skipped.keys() == ABSENT
    assert all(skipped.values())
    timed = [row for row in rows if row["kind"] == "product"]
    assert {row["name"].split(" ", 2)[2] for row in timed} == {
        "ours int4", "ours int8", "ours fp16", "cublas fp16", "tinygemm int4"
    }  # fmt: skip
    assert all(row["error"] < 1e-2 and row["version"] for row in timed)
    sums = {row["name"]: row["bytes"] for row in rows if row["kind"] == "step_products"}
    assert sums.keys() == {"3B step ours int4", "3B step tinygemm int4"}
    (ratio,) = (row for row in rows if row["kind"] == "ratio")
    assert "tinygemm" in ratio["name"]
    steps = {row["name"]: row for row in rows if row["kind"] == "step"}
    assert steps.keys() == set(STEPS)
    small, whole = steps["3B int4, lm-head int4, kv-cache int8"], steps["3B int4"]
    assert small["weight_bytes"] < whole["weight_bytes"] < steps["3B fp16"]["weight_bytes"]
    assert small["cache_bytes"] < whole["cache_bytes"]
    modes = {row["name"]: row for row in rows if row["kind"] == "launch_mode"}
    assert modes.keys() == {f"3B int4, {mode}" for mode in LAUNCH_MODES}
    assert all(row["same_bits"] and row["error"] == 0 for row in modes.values())
    # Two layers: a launch less for each; the interpreter has one for each phase.
    for mode, launch_mode in LAUNCH_MODES.items():
        launches = 13 if launch_mode.merge_attention else 15
        assert modes[f"3B int4, {mode}"]["launches"] == launches, mode


def test_what_fails_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import checks, steps
    from benchmarks.gpu.environment import Run

    def refused(*arguments: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nand more")

    run = Run("cpu", INTERPRETER, 600.0, tmp_path / "rows.jsonl")
    good, token = torch.ones(2), torch.tensor([40_000])
    CASES = {
        "bad": refused,
        "good": lambda *_: iter([(good, good), (token, token)]),
        "head": lambda *_: iter([(token + 70, token)]),
    }
    monkeypatch.setattr(checks, "CASES", CASES)
    assert not checks.check_all(run)
    bad, fine, wrong = run.rows
    assert (bad["agrees"], bad["reason"]) == (False, "RuntimeError: out of resource: shared memory")
    assert fine["agrees"]
    assert not wrong["agrees"], "tokens are right or wrong, not nearly right"
    written = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()[-1]
    assert json.loads(written)["error"] is None, "JSON has no infinity"
    assert json.loads(written)["reason"] == "error is inf"
    run.add("step", "3B int4", tokens_per_s=1.0)
    assert run.rows.pop()["disagreeing"] == ["head 3B"]
    run.add("step", "8B int4", tokens_per_s=1.0)
    assert "agrees" not in run.rows.pop()
    monkeypatch.setattr(steps, "random_llm", refused)
    steps.measure_steps(run)
    steps.measure_launch_modes(run)
    failed = [row["name"] for row in run.rows if row["kind"] == "failed"]
    assert failed == [*STEPS, "3B int4, launch modes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--only", "steps", "--out", tmp_path / "rows.jsonl")
    assert done.returncode == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rows} == {"failed, see log.txt"}
    assert "torch finds no CUDA GPU" in (tmp_path / "log.txt").read_text("utf-8")


def test_random_models_rotate_as_true_ones() -> None:
    """With other angles attention would be all but uniform, and equal bits would show little."""
    from benchmarks.gpu.inputs import config, random_llm
    from vila_deploy.onnx_export.rotary import rotary_tables

    sizes = config("3B", "int4", small=True)
    llm = random_llm(sizes, 16, "cpu")
    for found, expected in zip((llm.cos, llm.sin), rotary_tables(sizes, 16), strict=True):
        assert torch.equal(found, expected)
