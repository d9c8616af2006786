"""first_run.sh on the emulated GPU: a row for every stage, whatever goes wrong with three."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.plan import CALLS
from benchmarks.gpu.rows import read
from tests.support.paths import REPOSITORY

SITE = REPOSITORY / "tests" / "support" / "emulated_site"
# How much slower than an H200 the emulator may be: the stage that hangs is ended after 15 · 20 s.
SLOWER, LIMIT_S = 15, 7000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(LIMIT_S + 300),
    pytest.mark.skipif("FIRST_RUN" not in os.environ, reason="about an hour: make test-first-run"),
]
Rows = list[dict[str, Any]]


@pytest.fixture
def first_run(tmp_path: Path) -> Callable[..., tuple[int, Rows]]:
    """Makes a call in a folder of its own; returns its exit code and rows."""

    def call(number: str, faults: str, folder: str, **given: str) -> tuple[int, Rows]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        out = tmp_path / folder
        environment |= {
            "OUT": str(out), "PYTHON": sys.executable, "PYTHONPATH": str(SITE), "SMALL": "1",
            "SLOWER": str(SLOWER), "LIMIT_S": str(LIMIT_S), "FAULTS": faults,
            "TRITON_CACHE_DIR": str(tmp_path / "cache"), "VILA_DEPLOY_BASELINES": os.devnull,
            # tests/gpu has its own run on the emulated GPU.
            "PYTEST_ADDOPTS": "--collect-only", "VILA_DEPLOY_COMMIT": "rehearsed", **given,
        }  # fmt: skip
        command = [REPOSITORY / "benchmarks" / "gpu" / "first_run.sh", number]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (out / "log.txt").exists(), done.stderr
        return done.returncode, read(out / "rows.jsonl")

    return call


def stages(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows if row["kind"] == "stage"}


def test_one_hangs_one_crashes_one_disagrees(
    first_run: Callable[..., tuple[int, Rows]], tmp_path: Path
) -> None:
    code, rows = first_run("1", "hang=stream,crash=tinygemm,disagree=gate_up", "first")
    found = stages(rows)
    assert code == 1
    assert found.keys() == set(CALLS["1"])
    assert found["stream"]["exit_code"] == 124
    assert found["tinygemm"]["exit_code"] == -signal.SIGSEGV
    fine = {row["exit_code"] for name, row in found.items() if name not in ("stream", "tinygemm")}
    assert fine == {0}, found
    assert not [row for row in rows if row["kind"] == "failed"]
    checks = {row["name"]: row["agrees"] for row in rows if row["kind"] == "check"}
    assert [name for name, agrees in checks.items() if not agrees] == ["gate_up 3B"]
    (compiled,) = (row for row in rows if row["kind"] == "compiled")
    assert compiled["failed_helpers"] == 0
    assert compiled["kernels"] == compiled["compiled"] + compiled["found"] > 30
    timed = [row for row in rows if row["kind"] in ("step", "launch_mode", "kernel")]
    assert timed
    assert all(row["disagreeing"] == ["gate_up 3B"] for row in timed), (
        "marked and timed all the same"
    )
    modes = [row for row in rows if row["kind"] == "launch_mode"]
    assert all(row["same_bits"] and row["equal_bytes"] for row in modes)
    products = {row["name"] for row in rows if row["kind"] == "kernel"}
    assert {
        f"3B int4 {name}" for name in ("qkv", "o", "gate_up", "down", "empty launch")
    } <= products

    # Call 2 repeats what disagreed, and finds the kernels of call 1.
    code, rows = first_run("2", "", "second", FIRST=str(tmp_path / "first"))
    again = {
        row["name"]: row for row in rows[rows.index(rows[-1]) - 60 :] if row["kind"] == "check"
    }
    assert stages(rows).keys() >= set(CALLS["2"])
    assert again["gate_up 3B"]["agrees"]
    assert [row for row in rows if row["kind"] == "session"]
    assert [row["found"] for row in rows if row["kind"] == "compiled"][-1] > 30
