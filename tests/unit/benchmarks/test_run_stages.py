"""Stages that hang, crash, disagree or come too late: every one has a row, and the rest goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import run_stages as module
from benchmarks.gpu.interruption import raised_as_interrupted
from benchmarks.gpu.plan import CALLS, STAGES, Plan
from benchmarks.gpu.rows import append, best_mode, read
from benchmarks.gpu.run_stages import RESERVE_S, run_stages
from benchmarks.gpu.stage_process import StageProcess
from tests.support.paths import REPOSITORY

FINE = "read line"
GPU_BENCHMARK = REPOSITORY / "benchmarks" / "gpu"
Ends = dict[str, str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a plan whose stages are shell commands; returns its exit code and stage rows."""
    monkeypatch.setattr(module, "gpu_state", lambda: None)

    def run_plan(plan: Plan, ends: Ends) -> dict[str, Any]:
        out = tmp_path / "rows.jsonl"

        def begin(name: str) -> StageProcess:
            command = ends.get(name, FINE).replace("OUT", str(out))
            return StageProcess(["bash", "-c", command], tmp_path / "log.txt")

        code = run_stages(plan, out, begin=begin)
        rows = [row for row in read(out) if row["kind"] == "stage"]
        return {"code": code, "rows": rows, **{row["name"]: row for row in rows}}

    return run_plan


def test_every_stage_has_its_row(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One hangs and ignores being asked to end, one dies, one breaks off within a line."""
    monkeypatch.setattr(module, "RESERVE_S", 0.0)
    monkeypatch.setattr("benchmarks.gpu.stage_process.KILL_AFTER_S", 0.3)
    stages = {name: replace(STAGES[name], estimate_s=0.1, timeout_s=200) for name in STAGES}
    stages["steps"] = replace(stages["steps"], timeout_s=0.5)
    monkeypatch.setattr("benchmarks.gpu.plan.STAGES", stages)
    monkeypatch.setattr(module, "STAGES", stages)
    alive = tmp_path / "alive"
    wrong = json.dumps({"kind": "check", "name": "head 3B", "agrees": False})
    found = run(
        Plan(CALLS["1"], 600.0),
        {
            "steps": f"read line; trap '' TERM; (sleep 2; touch {alive}) & sleep 100",
            "products": "read line; kill -SEGV $$",
            "checks": f"read line; echo '{wrong}' >> OUT",
            "prefill": 'read line; printf \'{"kind": "pre\' >> OUT; exit 1',
        },
    )
    assert [row["name"] for row in found["rows"]][:2] == ["machine", "compile"]
    assert {row["name"] for row in found["rows"]} == set(CALLS["1"])
    assert found["code"] == 1
    assert found["steps"]["exit_code"] == 124
    assert found["steps"]["reason"].startswith("ended after ")
    assert found["products"]["exit_code"] == -signal.SIGSEGV
    assert found["prefill"]["exit_code"] == 1
    others = set(CALLS["1"]) - {"steps", "products", "prefill"}
    assert all(found[name]["exit_code"] == 0 for name in others)
    time.sleep(2)
    assert not alive.exists(), "what a stage has begun ends with it"


def test_a_device_that_answers_no_more_is_not_asked_again(
    run: Callable[..., dict[str, Any]],
) -> None:
    found = run(Plan(("stream", "steps", "pack"), 100.0), {"stream": "exit 3", "probe": "exit 1"})
    assert found["stream"]["exit_code"] == 3
    assert found["steps"]["reason"] == "not begun: the device doesn't answer"
    assert found["pack"]["exit_code"] == 0


def test_what_has_no_time_left_is_not_begun(run: Callable[..., dict[str, Any]]) -> None:
    found = run(Plan(("stream", "humming", "pack"), 30.0), {})
    assert found["stream"]["exit_code"] == found["pack"]["exit_code"] == 0
    assert found["humming"]["reason"].startswith("not begun: ")
    assert found["code"] == 0


def test_nothing_is_timed_beside_the_background(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    checked, done = tmp_path / "checked", tmp_path / "done"
    found = run(
        Plan(("tests", "checks", "stream"), 600.0),
        {
            "tests": f"read line; until test -e {checked}; do sleep 0.05; done; touch {done}",
            "checks": f"read line; test ! -e {done}; touch {checked}",
            "stream": f"read line; test -e {done}",
        },
    )
    assert [row["exit_code"] for row in found["rows"]] == [0, 0, 0]
    assert [row["name"] for row in found["rows"]] == ["checks", "tests", "stream"]


def test_broken_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read(path) == []
    path.write_text('{"kind": "a", "name": "b"}\n[1]\n\xff{\n{"kind": "c", "na', "latin-1")
    append(path, {"kind": "d", "name": "e", "x": float("nan")})
    assert read(path) == [
        {"kind": "a", "name": "b"},
        {"kind": "d", "name": "e", "x": None, "reason": "x is nan"},
    ]


def test_the_best_mode_is_of_the_last_rows_with_equal_bytes() -> None:
    rows: list[dict[str, Any]] = []
    assert best_mode(rows, "3B") == "separate"
    for name, tokens_per_s, same_bits in (
        ("3B int4, pdl", 300.0, True),
        ("3B int4, fused", 400.0, False),
        ("8B int4, fused", 500.0, True),
        ("3B int4, merged-attention", 200.0, True),
        ("3B int4, pdl", 100.0, True),
    ):
        row = {"kind": "launch_mode", "name": name, "tokens_per_s": tokens_per_s}
        rows.append({**row, "same_bits": same_bits})
    assert best_mode(rows, "3B") == "merged-attention"
    rows.append({**rows[3], "agrees": False})
    assert best_mode(rows, "3B") == "pdl"


def test_the_plan_fits_into_its_time() -> None:
    for name, limit_s in (("1", 480), ("2", 300)):
        stages = [STAGES[stage] for stage in CALLS[name]]
        assert sum(stage.estimate_s for stage in stages if not stage.background) < limit_s
        assert all(stage.estimate_s <= stage.timeout_s for stage in stages)
    # What looks at the time before each of four models still begins the last one.
    for name in CALLS["1"]:
        source = GPU_BENCHMARK / f"{STAGES[name].function.partition(':')[0]}.py"
        least = re.search(r"^LEAST_S = ([\d.]+)", source.read_text("utf-8"), re.M)
        left_s = STAGES[name].timeout_s - RESERVE_S / 2 - STAGES[name].estimate_s * 3 / 4
        assert least is None or left_s >= float(least[1]), name
    assert CALLS["1"].index("launch_modes") < CALLS["1"].index("products"), "most wanted first"
    assert CALLS["1"][-2] == "fused", "what may hang comes last"


def test_an_interrupted_run_gives_every_stage_its_row(tmp_path: Path) -> None:
    """The signal comes from a stage that goes on after it; nothing of it is left."""
    script = """
import sys
from pathlib import Path
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.run_stages import RESERVE_S, run_stages
from benchmarks.gpu.stage_process import StageProcess

ENDS = {"compile": "read line", "steps": "read line; kill -TERM $PPID; sleep 1000"}
out = Path(sys.argv[1])
begin = lambda name: StageProcess(["bash", "-c", ENDS.get(name, "read")], out.parent / "log.txt")
sys.exit(run_stages(Plan(("compile", "steps", "prefill", "pack"), 600.0), out, begin=begin))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "rows.jsonl"],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "ONLY=compile,steps,prefill,pack" in done.stdout.splitlines()[-1]
    found = {row["name"]: row for row in read(tmp_path / "rows.jsonl")}
    assert list(found) == ["compile", "steps", "prefill", "pack"]
    assert found["compile"]["exit_code"] == 0
    for name in ("steps", "prefill", "pack"):
        assert found[name]["exit_code"] is None
        assert found[name]["reason"] == "interrupted by SIGTERM"


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raised_as_interrupted():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_says_how_long_it_took_and_how_much_memory(tmp_path: Path) -> None:
    """However late somebody looks."""
    process = StageProcess(["bash", "-c", FINE], tmp_path / "log.txt")
    process.release(60)
    assert process.wait(60) == 0
    seconds = process.seconds
    time.sleep(0.01)
    assert process.seconds == seconds
    assert process.peak_memory_bytes is not None
    assert process.peak_memory_bytes > 1 << 16


def test_a_stage_knows_the_end_of_its_time(tmp_path: Path) -> None:
    process = StageProcess(["bash", "-c", "read line; echo $line"], tmp_path / "log.txt")
    before = time.monotonic()
    process.release(60)
    assert process.wait(60) == 0
    end = float((tmp_path / "log.txt").read_text())
    assert before + 60 <= end <= time.monotonic() + 60
