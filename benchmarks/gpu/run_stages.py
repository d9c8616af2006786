"""Run stages one after another, each in its own process: what one does to itself concerns no other.

This process touches no CUDA. While a stage runs, the next one's process imports and waits. Nothing
is timed while anything compiles. After a stage that failed, the device is asked for a sign of life.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu import rows
from benchmarks.gpu.interruption import Interrupted, raised_as_interrupted
from benchmarks.gpu.machine import gpu_state
from benchmarks.gpu.plan import STAGES, Plan, Stage
from benchmarks.gpu.preflight import LOG
from benchmarks.gpu.stage_process import StageProcess

# Left of the time when a stage ends, for what comes behind the last one.
RESERVE_S = 10.0
PROBE_S = 30.0
COMPILE, PACK = "compile", "pack"
SIGNALLED = 128  # and the signal: exit code of a run that was interrupted
Begin = Callable[[str], StageProcess]


def run_stages(
    plan: Plan,
    out: Path,
    *,
    small: bool = False,
    begin: Begin | None = None,
) -> int:
    """Run the stages of `plan`; return 1 if one failed or found a kernel wrong.

    Every stage has a row of kind "stage" in `out`, also one that did not begin, and also where the
    run is interrupted.

    Args:
        begin: from a stage's name to its process; None means `stage.py`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    return _Runner(plan, out, small, begin or stage_command(out, small=small)).run()


def stage_command(out: Path, *, small: bool) -> Begin:
    """Return what begins a stage that appends its rows to `out`."""

    def begin(name: str) -> StageProcess:
        command = [
            sys.executable, "-m", "benchmarks.gpu.stage", name, "--out", str(out),
            *(["--small"] if small else []),
        ]  # fmt: skip
        return StageProcess(command, out.parent / LOG)

    return begin


class _Runner:
    def __init__(self, plan: Plan, out: Path, small: bool, begin: Begin):
        self._plan, self._out, self._begin, self._small = plan, out, begin, small
        self._deadline = time.monotonic() + plan.limit_s
        self._first_row = len(rows.read(out))
        self._background: dict[str, StageProcess] = {}
        self._next: tuple[str, StageProcess] | None = None
        self._current: StageProcess | None = None
        self._without_row = list(plan.stages)
        self._device_answers, self._failed = True, False

    @property
    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def run(self) -> int:
        interruption: Interrupted | None = None
        with raised_as_interrupted():
            try:
                self._run_all()
            except Interrupted as error:
                interruption = error
            finally:
                self._kill_all()
        if interruption is not None:
            return self._after(interruption)
        found = rows.read(self._out)[self._first_row :]
        wrong = [row["name"] for row in found if _is_wrong(row)]
        if wrong:
            print(f"disagreeing: {', '.join(wrong)}")
        print(f"{len(found)} rows in {self._out}")
        return int(self._failed or bool(wrong))

    def _run_all(self) -> None:
        names = self._plan.stages
        for index, name in enumerate(names):
            stage = self._plan.stage(name)
            if stage.timed:
                self._await_background()
            following = next((n for n in names[index + 1 :] if not STAGES[n].background), None)
            self._run(name, stage, following)
        self._await_background()

    def _kill_all(self) -> None:
        begun = [*self._background.values(), self._current, self._next and self._next[1]]
        for process in begun:
            if process is not None:
                process.kill()

    def _after(self, interruption: Interrupted) -> int:
        """Give the stages that are left their rows, and say how to go on.

        Whoever goes on may do so on another machine, which has none of the compiled kernels.
        """
        left = list(self._without_row)
        for name in left:
            self._row(name, reason=str(interruption), exit_code=None)
        rest = [name for name in self._plan.stages if name in left or name == COMPILE]
        print(f"{interruption}; the same command with ONLY={','.join(rest)} does the rest")
        return SIGNALLED + interruption.number

    def _run(self, name: str, stage: Stage, following: str | None) -> None:
        needed = min(stage.estimate_s, stage.timeout_s) + RESERVE_S
        if name == PACK:
            needed = stage.estimate_s
        reason = None
        if self._left_s < needed:
            reason = f"not begun: {self._left_s:.0f} s left"
        elif not self._device_answers and name != PACK:
            reason = "not begun: the device doesn't answer"
        if reason:
            if self._next and self._next[0] == name:
                self._next[1].kill()
                self._next = None
            self._row(name, reason=reason, exit_code=None)
            return
        process = self._current = self._process(name)
        # What comes last may take what the others have left it.
        timeout_s = min(stage.timeout_s, self._left_s - (0 if name == PACK else RESERVE_S / 2))
        process.release(max(1.0, timeout_s - RESERVE_S / 2))
        if stage.background:
            self._background[name] = process
            return
        if following is not None:
            self._next = (following, self._begin(following))
        state: dict[str, Any] = {}

        def meanwhile(seconds: float) -> None:
            for other in self._background.values():
                other.poll()  # notes when it ended
            if not state and seconds > stage.estimate_s / 2:
                state.update(gpu_state() or {"unknown": True})

        code = process.wait(timeout_s, meanwhile)
        self._end(name, process, code, state)

    def _process(self, name: str) -> StageProcess:
        """Return the process of a stage, which may have been begun before."""
        if self._next and self._next[0] == name:
            process, self._next = self._next[1], None
            return process
        return self._begin(name)

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
            reason = f"ended by signal {-code}" if code < 0 else f"failed, see {LOG}"
        self._row(
            name, reason=reason, exit_code=code, seconds=seconds, gpu=state or None,
            host_memory_bytes=process.peak_memory_bytes,
        )  # fmt: skip
        if code:
            self._failed = True
            if not STAGES[name].background and {*self._without_row} - {PACK}:
                self._probe()

    def _probe(self) -> None:
        probe = self._current = self._begin("probe")
        probe.release(PROBE_S)
        self._device_answers = probe.wait(PROBE_S * self._plan.slower) == 0
        if not self._device_answers:
            print(f"the device doesn't answer, see {LOG}", flush=True)

    def _row(self, name: str, **values: Any) -> None:
        row = {"kind": "stage", "name": name, "label": "rehearsed" if self._small else "measured"}
        row |= {"estimate_s": self._plan.stage(name).estimate_s, "left_s": self._left_s, **values}
        row["commit"] = os.environ.get("VILA_DEPLOY_COMMIT")
        row["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        rows.append(self._out, row)
        self._without_row.remove(name)
        took = f"{values['seconds']:6.1f} s" if "seconds" in values else "       -"
        print(f"{name:14} {took} exit {values['exit_code']} {values['reason'] or ''}", flush=True)


def _is_wrong(row: rows.Row) -> bool:
    """Return whether a row is wrong by itself, and not only marked for what it rests on."""
    return row.get("agrees") is False and "disagreeing" not in row
