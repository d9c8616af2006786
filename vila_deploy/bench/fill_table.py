"""Fill the authors' table within a time: plan every row, build and measure what fits, predict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vila_deploy.bench.estimates import Rates, predict, row_seconds
from vila_deploy.bench.measure_row import MeasureSettings
from vila_deploy.bench.noise import best_bandwidth, noise
from vila_deploy.bench.results_file import ResultsFile, Row
from vila_deploy.bench.table_rows import RowPlan, TableRow, engine_length
from vila_deploy.engine.target import Target
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import Advance

MEASURED, PREDICTED, OOM, FAILED = "measured", "predicted", "oom", "failed"
# Not run, and without the known shapes that a prediction needs.
SKIPPED = "skipped"
# Beside the engine, the disk keeps this free.
DISK_RESERVE_BYTES = 1 << 30


class TimeUp(Exception):
    """The time allowed for the table ended while a row was at work."""


@dataclass(frozen=True)
class TimeLimit:
    """Seconds that a step of a row may take; `tick` is called about once a second meanwhile."""

    seconds: float
    tick: Callable[[], None]


class Worker(Protocol):
    """Builds and measures engines in processes of their own."""

    def build(
        self, model: str, precision: str, max_seq_len: int, out: Path, limit: TimeLimit
    ) -> None:
        """Write an engine with random weights into the new folder `out`.

        Raises:
            VilaDeployError: the process failed or died.
            TimeUp: it was ended at the limit.
        """
        ...

    def measure(self, engine: Path, settings: MeasureSettings, limit: TimeLimit) -> Row:
        """Return what `measure_row` does; raises as `build` does."""
        ...


@dataclass(frozen=True)
class Table:
    """What is to be filled and how.

    Args:
        plans: of the rows whose shapes are known.
        identity: keys and values of a row that must be equal for it to be kept from an earlier
            run: device, target, commit and settings.
        rates: of this computer before any row has run.
        earlier_bandwidth: what its memory gave beside rows that are no longer kept, if known.
        scratch: returns a new folder for an engine, removed at the end of the block.
        free_bytes: returns what the disk of that folder has free.
    """

    rows: Sequence[TableRow]
    plans: dict[TableRow, RowPlan]
    target: Target
    settings: MeasureSettings
    minutes: float
    identity: dict[str, Any]
    rates: Rates
    worker: Worker
    scratch: Callable[[], AbstractContextManager[Path]]
    free_bytes: Callable[[], int]
    earlier_bandwidth: float | None = None
    clock: Callable[[], float] = time.monotonic


def fill_table(table: Table, results: ResultsFile, advance: Advance) -> list[Row]:
    """Return a row for each of `table.rows`; each is appended to `results` as it ends.

    Rows that an earlier run of the same identity has measured are kept. The others run in the
    order of their estimated time, as long as the next one fits into what is left of the minutes.

    Raises:
        VilaDeployError: `results` can't be read.
    """
    filler = _Filler(table, results, advance)
    filler.refuse()
    filler.run()
    filler.mark_noise()
    filler.predict_rest()
    return [filler.done[row] for row in table.rows]


def expected_seconds(table: Table, earlier: Sequence[Row]) -> int:
    """Return about how long the rows will take that will run within the minutes.

    Args:
        earlier: rows of earlier runs, for their rates.
    """
    left = table.minutes * 60
    for seconds in sorted(_weights(table, earlier).values()):
        if seconds > left:
            break
        left -= seconds
    return round(table.minutes * 60 - left)


def _weights(table: Table, earlier: Sequence[Row]) -> dict[TableRow, int]:
    """Return the estimated seconds of each row that can run and hasn't."""
    rates = table.rates.learn(earlier)
    kept = _kept(table, earlier)
    return {
        row: round(row_seconds(plan, rates, table.settings, builds=row.engine is None))
        for row, plan in table.plans.items()
        if row not in kept and (row.engine is not None or plan.fits)
    }


def _kept(table: Table, earlier: Sequence[Row]) -> dict[TableRow, Row]:
    """Return the measured rows of earlier runs under the same conditions; the last of each."""
    known = {_key(_begin(row)): row for row in table.rows}
    return {
        known[_key(old)]: old
        for old in earlier
        if _key(old) in known
        and old.get("label") == MEASURED
        and all(old.get(key) == value for key, value in table.identity.items())
    }


class _Filler:
    def __init__(self, table: Table, results: ResultsFile, advance: Advance):
        self._table, self._results, self._advance = table, results, advance
        self._deadline = table.clock() + table.minutes * 60
        earlier = results.read()
        self._weights = _weights(table, earlier)
        self.done = _kept(table, earlier)
        self._reasons: dict[TableRow, str] = {}

    def refuse(self) -> None:
        """End the rows that can't run, before any work."""
        for row in self._table.rows:
            plan = self._table.plans.get(row)
            if row in self.done:
                continue
            if row.problem:
                self._end(row, FAILED, {"reason": row.problem})
            elif row.engine is None and plan is None:
                self._end(row, SKIPPED, {"reason": "this version doesn't know its shapes"})
            elif row.engine is None and plan is not None and not plan.fits:
                self._end(row, OOM, _out_of_memory(plan))

    def run(self) -> None:
        """Build and measure rows, the shortest first, until the next would take too long."""
        waiting = [row for row in self._table.rows if row not in self.done]
        while waiting:
            seconds = {row: self._seconds(row) for row in waiting}
            row = min(waiting, key=lambda row: seconds[row])
            left = self._deadline - self._table.clock()
            waiting.remove(row)
            if left <= 0 or seconds[row] > left:
                for late in (row, *waiting):
                    self._reasons[late] = (
                        _too_long(seconds[late], left)
                        if self._table.minutes
                        else "with --minutes 0 nothing is built or measured"
                    )
                return
            self._run_row(row)

    def mark_noise(self) -> None:
        """Mark each measured row that is noisy by what all of them have found.

        Rows whose mark changes are appended again; the last of a row counts.
        """
        measured = {row: r for row, r in self.done.items() if r["label"] == MEASURED}
        best = best_bandwidth(measured.values())
        for row, old in measured.items():
            marked = old | _noise_marks(old, best)
            if marked != old:
                self.done[row] = marked
                self._results.append(marked)

    def predict_rest(self) -> None:
        """Predict the rows that did not run from the median share of those that did."""
        rates = self._table.rates.learn(self.done.values())
        for row in self._table.rows:
            if row in self.done:
                continue
            reason = {"reason": self._reasons[row]}
            if row in self._table.plans:
                figures = predict(self._table.plans[row], rates, self._table.settings.contexts)
                self._end(row, PREDICTED, {**figures, **reason})
            else:
                self._end(row, SKIPPED, reason)

    def _seconds(self, row: TableRow) -> float:
        plan = self._table.plans.get(row)
        if plan is None:
            return 0.0
        rates = self._table.rates.learn(self.done.values())
        return row_seconds(plan, rates, self._table.settings, builds=row.engine is None)

    def _run_row(self, row: TableRow) -> None:
        """Build and measure one row; what goes wrong with it concerns no other row."""
        table, began = self._table, self._table.clock()
        steps = _Steps(
            self._advance,
            f"row {len(self.done) + 1} of {len(table.rows)}: {row.title}",
            self._weights.get(row, 0),
        )
        try:
            measured = self._build_and_measure(row, steps)
            if measured is not None:
                measured |= {"earlier_bandwidth_bytes_per_s": table.earlier_bandwidth}
                best = best_bandwidth([*self.done.values(), measured])
                self._end(row, MEASURED, measured | _noise_marks(measured, best))
        except TimeUp:
            took = table.clock() - began
            self._reasons[row] = f"ended after {took:.0f} s, when the time was up"
        except VilaDeployError as error:
            self._end(row, FAILED, {"reason": str(error)})
        finally:
            steps.finish()

    def _build_and_measure(self, row: TableRow, steps: _Steps) -> Row | None:
        """Return the measured figures; None, with the reason noted, without room on the disk."""
        table = self._table
        if row.engine is not None:
            return self._measure(row, row.engine, steps)
        plan = table.plans[row]
        free, needed = table.free_bytes(), plan.disk_bytes + DISK_RESERVE_BYTES
        if free < needed:
            self._reasons[row] = (
                f"no room on the disk: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                "choose another --results"
            )
            return None
        with table.scratch() as folder:
            began, engine = table.clock(), folder / "engine"
            limit = self._limit(steps.begin("building"))
            table.worker.build(row.model, row.precision, engine_length(row.model), engine, limit)
            build_s = table.clock() - began
            return self._measure(row, engine, steps) | {"build_s": build_s}

    def _measure(self, row: TableRow, engine: Path, steps: _Steps) -> Row:
        limit = self._limit(steps.begin("measuring"))
        measured = self._table.worker.measure(engine, self._table.settings, limit)
        plan = self._table.plans.get(row)
        if plan is not None:
            first_token_s = measured["ttft_ms"]["total"] / 1e3
            known = {"disk_bytes": plan.disk_bytes, "prompt_flops": plan.prompt_flops}
            measured |= {**known, "first_token_s": first_token_s}
        return measured

    def _limit(self, tick: Callable[[], None]) -> TimeLimit:
        return TimeLimit(max(1.0, self._deadline - self._table.clock()), tick)

    def _end(self, row: TableRow, label: str, values: Row) -> None:
        ended = {**_begin(row), **values, **self._table.identity, "label": label}
        self.done[row] = ended
        self._results.append(ended)


class _Steps:
    """The progress of one row: a step a second, as many in all as were estimated."""

    def __init__(self, advance: Advance, title: str, seconds: int):
        self._advance, self._title, self._left = advance, title, seconds

    def begin(self, work: str) -> Callable[[], None]:
        """Show what begins, and return the function that counts a second of it."""
        text = f"{self._title}, {work}"
        self._advance(text, 0)

        def tick() -> None:
            # The last second is counted when the row has ended.
            step = int(self._left > 1)
            self._left -= step
            self._advance(text, step)

        return tick

    def finish(self) -> None:
        self._advance(self._title, self._left)


def _noise_marks(row: Row, best: float | None) -> Row:
    reasons = noise(row, best)
    return {"noisy": bool(reasons), "noise": reasons}


def _begin(row: TableRow) -> Row:
    engine = None if row.engine is None else str(row.engine.resolve())
    return {"model": row.model, "precision": row.precision, "engine": engine}


def _key(row: Row) -> tuple[Any, ...]:
    return row.get("model"), row.get("precision"), row.get("engine")


def _out_of_memory(plan: RowPlan) -> Row:
    needed, limit = plan.plan.device_bytes, plan.plan.limit_bytes
    reason = (
        f"needs {needed / 1e9:.1f} GB of memory, {limit / 1e9:.1f} GB are there; what would do: "
        f"{plan.advice}"
    )
    return {"needed_bytes": needed, "limit_bytes": limit, "reason": reason}


def _too_long(seconds: float, left: float) -> str:
    return f"would take about {seconds:.0f} s, {max(left, 0):.0f} s of the time are left"
