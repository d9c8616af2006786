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
from tests.support.emulated_stage import MEMORY_LIMIT_BYTES
from tests.support.paths import REPOSITORY

SITE = REPOSITORY / "tests" / "support" / "emulated_site"
# How much slower than an H200 the emulator may be: what hangs is ended after 20 times so many s.
SLOWER = float(os.environ.get("SLOWER", "15"))
LIMIT_S = 470 * SLOWER
# What a process maps of libraries counts beside the memory that it asks for.
LIBRARY_BYTES = 1 << 30
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * LIMIT_S),
    pytest.mark.skipif("FIRST_RUN" not in os.environ, reason="15 minutes: make test-first-run"),
]
Rows = list[dict[str, Any]]
Call = Callable[..., tuple[int, Rows]]


@pytest.fixture
def first_run(tmp_path: Path) -> Call:
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
        print(done.stdout, done.stderr)
        return done.returncode, read(out / "rows.jsonl")

    return call


def test_one_hangs_one_crashes_one_disagrees(first_run: Call, tmp_path: Path) -> None:
    code, first = first_run("1", "hang=stream,crash=tinygemm,disagree=gate_up", "first")
    assert code == 1
    ends = {"stream": 124, "tinygemm": -signal.SIGSEGV}
    check_stages(first, "1", ends)
    check_first_call(first)
    log = (tmp_path / "first" / "log.txt").read_text("utf-8", "replace")
    for where in ('emulated_stage.py", line', "Fatal Python error: Segmentation fault"):
        assert where in log, "the log says where a stage hung or crashed"

    # Call 2 repeats what disagreed, and finds the kernels of call 1.
    code, rows = first_run("2", "", "second", FIRST=str(tmp_path / "first"))
    assert rows[: len(first)] == first
    second = rows[len(first) :]
    assert code == 0
    check_stages(second, "2", {})
    (again,) = (row for row in second if row["kind"] == "check")
    assert (again["name"], again["agrees"]) == ("gate_up 3B", True)
    assert [row for row in second if row["kind"] == "session"]
    (compiled,) = (row for row in second if row["kind"] == "compiled")
    assert compiled["compiled"] == 0
    assert compiled["found"] == compiled["kernels"] > 30
    assert not [row for row in second if "disagreeing" in row]


def check_stages(rows: Rows, call: str, ends: dict[str, int]) -> None:
    """Every stage has a row and ended as `ends` says, else well, within its memory."""
    stages = {row["name"]: row for row in rows if row["kind"] == "stage"}
    assert stages.keys() == set(CALLS[call])
    expected = {name: ends.get(name, 0) for name in stages}
    assert {name: row["exit_code"] for name, row in stages.items()} == expected
    assert not [row for row in rows if row["kind"] in ("failed", "compiled_late")]
    for name, row in stages.items():
        assert row["host_memory_bytes"] < MEMORY_LIMIT_BYTES + LIBRARY_BYTES, name


def check_first_call(rows: Rows) -> None:
    """What disagrees is named and marked, and all is compiled, checked and timed all the same."""
    checks = {row["name"]: row["agrees"] for row in rows if row["kind"] == "check"}
    assert [name for name, agrees in checks.items() if not agrees] == ["gate_up 3B"]
    (compiled,) = (row for row in rows if row["kind"] == "compiled")
    assert compiled["failed_helpers"] == 0
    assert compiled["kernels"] == compiled["compiled"] + compiled["found"] > 30
    timed = [row for row in rows if row["kind"] in ("step", "launch_mode", "kernel")]
    assert timed
    assert all(row["disagreeing"] == ["gate_up 3B"] for row in timed)
    modes = [row for row in rows if row["kind"] == "launch_mode"]
    assert all(row["same_bits"] and row["equal_bytes"] for row in modes)
    products = {row["name"] for row in rows if row["kind"] == "kernel"}
    named = ("qkv", "o", "gate_up", "down", "empty launch")
    assert {f"3B int4 {name}" for name in named} <= products
