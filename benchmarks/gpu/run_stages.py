"""Run stages one after another, each in its own process: what one does to itself concerns no other.

This process touches no CUDA. While a stage runs, the next one's process imports and waits. Nothing
is timed while anything compiles. After a stage that failed, the device is asked for a sign of life.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import rows
from benchmarks.gpu.machine import gpu_state
from benchmarks.gpu.plan import STAGES, Plan, Stage
from benchmarks.gpu.stage_process import StageProcess

# Left of the time when a stage ends, for what comes behind the last one.
RESERVE_S = 10.0
PROBE_S = 15.0
PACK = "pack"
Begin = Callable[[str, float], StageProcess]


def run_stages(
    plan: Plan,
    out: Path,
    *,
    small: bool = False,
    begin: Begin | None = None,
) -> int:
    """Run the stages of `plan`; return 1 if one failed or found a kernel wrong.

    Every stage has a row of kind "stage" in `out`, also one that did not begin.

    Args:
        begin: from a stage's name and seconds to its process; None means `stage.py`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    return _Runner(plan, out, small, begin or stage_command(out, small=small)).run()


def stage_command(out: Path, *, small: bool) -> Begin:
    """Return what begins a stage that appends its rows to `out`."""

    def begin(name: str, limit_s: float) -> StageProcess:
        command = [
            sys.executable, "-m", "benchmarks.gpu.stage", name, "--out", str(out),
            "--limit-s", f"{limit_s:.1f}", *(["--small"] if small else []),
        ]  # fmt: skip
        return StageProcess(command, out.parent / "log.txt")

    return begin


class _Runner:
    def __init__(self, plan: Plan, out: Path, small: bool, begin: Begin):
        self._plan, self._out, self._begin, self._small = plan, out, begin, small
        self._deadline = time.monotonic() + plan.limit_s
        self._first_row = len(rows.read(out))
        self._background: dict[str, StageProcess] = {}
        self._next: tuple[str, StageProcess] | None = None
        self._device_answers, self._failed = True, False

    @property
    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def run(self) -> int:
        names = self._plan.stages
        try:
            for index, name in enumerate(names):
                stage = self._plan.stage(name)
                if stage.timed:
                    self._await_background()
                following = next((n for n in names[index + 1 :] if not STAGES[n].background), None)
                self._run(name, stage, following)
            self._await_background()
        finally:
            for process in (*self._background.values(), *([self._next[1]] if self._next else [])):
                process.kill()
        wrong = [r["name"] for r in rows.read(self._out)[self._first_row :] if _is_wrong(r)]
        if wrong:
            print(f"disagreeing: {', '.join(wrong)}")
        print(f"{len(rows.read(self._out)) - self._first_row} rows in {self._out}")
        return int(self._failed or bool(wrong))

    def _run(self, name: str, stage: Stage, following: str | None) -> None:
        needed = min(stage.estimate_s, stage.timeout_s) + RESERVE_S
        if name == PACK:
            needed = stage.estimate_s
        reason = None
        if self._left_s < needed:
            reason = f"not begun: {self._left_s:.0f} s left"
        elif not self._device_answers and stage.timed:
            reason = "not begun: the device doesn't answer"
        if reason:
            if self._next and self._next[0] == name:
                self._next[1].kill()
                self._next = None
            self._row(name, reason=reason, exit_code=None)
            return
        process = self._process(name)
        process.release()
        if stage.background:
            self._background[name] = process
            return
        if following is not None:
            self._next = (following, self._process(following))
        state: dict[str, Any] = {}

        def meanwhile(seconds: float) -> None:
            if not state and seconds > stage.estimate_s / 2:
                state.update(gpu_state() or {"unknown": True})

        timeout_s = min(stage.timeout_s, self._left_s - RESERVE_S / 2)
        code = process.wait(timeout_s, meanwhile)
        self._end(name, process, code, state)

    def _process(self, name: str) -> StageProcess:
        """Return the process of a stage, which may have been begun before."""
        if self._next and self._next[0] == name:
            process, self._next = self._next[1], None
            return process
        limit_s = max(1.0, min(self._plan.stage(name).timeout_s, self._left_s) - RESERVE_S / 2)
        return self._begin(name, limit_s)

    def _await_background(self) -> None:
        while self._background:
            name, process = next(iter(self._background.items()))
            left_s = self._plan.stage(name).timeout_s
            code = process.wait(min(left_s, process.seconds + self._left_s))
            del self._background[name]
            self._end(name, process, code, {})

    def _end(self, name: str, process: StageProcess, code: int, state: dict[str, Any]) -> None:
        seconds = process.seconds
        reason = None
        if code == 124:
            reason = f"ended after {seconds:.0f} s"
        elif code:
            reason = f"ended by signal {-code}" if code < 0 else "failed, see log.txt"
        self._row(name, reason=reason, exit_code=code, seconds=seconds, gpu=state or None)
        if code and STAGES[name].timed:
            self._failed = True
            probe = self._begin("probe", PROBE_S)
            probe.release()
            self._device_answers = probe.wait(PROBE_S * self._plan.slower) == 0
        elif code:
            self._failed = True

    def _row(self, name: str, **values: Any) -> None:
        row = {"kind": "stage", "name": name, "label": "rehearsed" if self._small else "measured"}
        row |= {"estimate_s": self._plan.stage(name).estimate_s, "left_s": self._left_s, **values}
        row["commit"] = os.environ.get("VILA_DEPLOY_COMMIT")
        rows.append(self._out, row)
        took = f"{values['seconds']:6.1f} s" if "seconds" in values else "       -"
        print(f"{name:14} {took} exit {values['exit_code']} {values['reason'] or ''}", flush=True)


def _is_wrong(row: rows.Row) -> bool:
    """Return whether a row is wrong by itself, and not only marked for what it rests on."""
    return row.get("agrees") is False and "disagreeing" not in row
