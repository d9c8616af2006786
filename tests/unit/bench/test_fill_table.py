"""The table's rows: order, time, resuming, out of memory, failures and predictions."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.bench_table import BANDWIDTH, FakeWorker, fake_table, results_file
from vila_deploy.bench import fill_table as fill_table_module
from vila_deploy.bench.fill_table import expected_seconds, fill_table
from vila_deploy.bench.table_rows import AUTHORS_MODELS, TableRow
from vila_deploy.utils.errors import VilaDeployError

MEMORY_BYTES = 22_000_000_000
FIT = {
    "VILA1.5-3b fp16", "VILA1.5-3b int4", "VILA1.5-3b-s2 fp16", "VILA1.5-3b-s2 int4",
    "Llama-3-VILA1.5-8B int4", "VILA1.5-13b int4",
}  # fmt: skip
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer with 22 GB to spare."""
    monkeypatch.setattr("vila_deploy.engine.memory.available_memory_bytes", lambda: MEMORY_BYTES)


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., list[Row]]:
    def run(worker: FakeWorker, **options: Any) -> list[Row]:
        table = fake_table(tmp_path, worker, **options)
        return fill_table(table, results_file(tmp_path / "r"), lambda text="", steps=1: None)

    return run


def titles(rows: list[Row], label: str) -> set[str]:
    return {f"{row['model']} {row['precision']}" for row in rows if row["label"] == label}


def lines(tmp_path: Path) -> list[Row]:
    return [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").read_text().splitlines()]


def test_ten_rows_in_the_authors_order(fill: Callable[..., list[Row]], tmp_path: Path) -> None:
    worker = FakeWorker()
    rows = fill(worker)
    expected = [(model, precision) for model in AUTHORS_MODELS for precision in ("fp16", "int4")]
    assert [(row["model"], row["precision"]) for row in rows] == expected
    assert titles(rows, "measured") == FIT
    assert len(lines(tmp_path)) == 10
    assert list(tmp_path.glob("work-*")) == [], "engines are deleted"


def test_rows_run_in_the_order_of_their_cost(fill: Callable[..., list[Row]]) -> None:
    worker = FakeWorker()
    fill(worker)
    assert worker.built[0] == "VILA1.5-3b int4"
    assert worker.built.index("VILA1.5-3b fp16") > worker.built.index("VILA1.5-3b-s2 int4")
    assert worker.built.index("VILA1.5-13b int4") > worker.built.index("Llama-3-VILA1.5-8B int4")


def test_what_does_not_fit_is_out_of_memory_before_any_work(
    fill: Callable[..., list[Row]], tmp_path: Path
) -> None:
    rows = fill(FakeWorker())
    assert titles(rows, "oom") == {"Llama-3-VILA1.5-8B fp16", "VILA1.5-13b fp16",
                                   "VILA1.5-40b fp16", "VILA1.5-40b int4"}  # fmt: skip
    assert {row["label"] for row in lines(tmp_path)[:4]} == {"oom"}, "written first"
    (row,) = (row for row in rows if row["model"] == AUTHORS_MODELS[2] and row["label"] == "oom")
    assert row["needed_bytes"] > row["limit_bytes"] == MEMORY_BYTES
    assert "what would do: vila-build-engine --backend llamacpp" in row["reason"]
    (row,) = (row for row in rows if row["model"] == AUTHORS_MODELS[3] and row["label"] == "oom")
    assert "int4 needs" in row["reason"]
    assert "decode" not in row


def test_no_minutes_build_nothing(fill: Callable[..., list[Row]]) -> None:
    worker = FakeWorker()
    rows = fill(worker, minutes=0)
    assert worker.built == worker.measured == []
    assert titles(rows, "predicted") == FIT
    row = next(row for row in rows if row["label"] == "predicted" and row["precision"] == "int4")
    assert row["upper_bound"], "nothing was measured whose share could be taken"
    weights = row["weight_bytes_per_token"] + 4 * row["cache_bytes_per_token"]
    assert row["decode"]["tinychat"]["tokens_per_s"] == pytest.approx(BANDWIDTH / weights)


def test_what_takes_too_long_is_predicted_from_what_ran(fill: Callable[..., list[Row]]) -> None:
    worker = FakeWorker(share={"int4": 0.6})
    rows = fill(worker, minutes=3)
    measured, predicted = titles(rows, "measured"), titles(rows, "predicted")
    assert measured
    assert predicted
    assert measured | predicted == FIT
    assert worker.now <= 180
    row = next(row for row in rows if row["label"] == "predicted" and row["precision"] == "int4")
    assert row["share"] == 0.6
    weights = row["weight_bytes_per_token"] + 4 * row["cache_bytes_per_token"]
    assert row["decode"]["tinychat"]["tokens_per_s"] == pytest.approx(0.6 * BANDWIDTH / weights)
    assert "would take about" in row["reason"]
    fp16 = next(row for row in rows if row["label"] == "predicted" and row["precision"] == "fp16")
    assert fp16["share"] == 0.6, "without a row of its precision: of all"


def test_a_row_that_overruns_is_ended_and_predicted(fill: Callable[..., list[Row]]) -> None:
    worker = FakeWorker(seconds=1e6)
    rows = fill(worker, minutes=5)
    assert worker.now == 300
    assert titles(rows, "predicted") == FIT
    assert any("ended after 300 s" in row.get("reason", "") for row in rows)


def test_estimates_follow_what_rows_took(fill: Callable[..., list[Row]]) -> None:
    """The fake builds every engine in 20 s, where the rates at the start say up to 85."""
    worker = FakeWorker()
    fill(worker, minutes=6.5)
    assert len(worker.built) == 6


@pytest.mark.parametrize("killed", range(6))
def test_killed_at_any_row_it_goes_on(
    killed: int, fill: Callable[..., list[Row]], tmp_path: Path
) -> None:
    order = FakeWorker()
    fill(order, commit="other")
    title = order.built[killed]
    worker = FakeWorker(problems={title: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        fill(worker)
    assert worker.built == order.built[: killed + 1]
    with (tmp_path / "r" / "rows.jsonl").open("a") as file:
        file.write('{"model": "VILA1.5-3b", "label": "measu')
    again = FakeWorker()
    rows = fill(again)
    assert again.built == order.built[killed:]
    assert titles(rows, "measured") == FIT


@pytest.mark.parametrize("changed", [{"device": "another"}, {"commit": "c1"}, {"settings": {}}])
def test_rows_of_other_conditions_are_measured_anew(
    changed: Row, fill: Callable[..., list[Row]]
) -> None:
    fill(FakeWorker())
    worker = FakeWorker()
    fill(worker, **changed)
    assert set(worker.built) == FIT
    same = FakeWorker()
    fill(same, **changed)
    assert same.built == []


def test_predicted_rows_run_when_there_is_more_time(fill: Callable[..., list[Row]]) -> None:
    fill(FakeWorker(), minutes=3)
    worker = FakeWorker()
    rows = fill(worker, minutes=60)
    assert titles(rows, "measured") == FIT
    assert "VILA1.5-3b int4" not in worker.built


def test_an_engine_that_dies_fails_alone(fill: Callable[..., list[Row]], tmp_path: Path) -> None:
    problem = VilaDeployError("the process died of SIGSEGV")
    rows = fill(FakeWorker(problems={"VILA1.5-3b int4": problem}))
    assert titles(rows, "failed") == {"VILA1.5-3b int4"}
    assert titles(rows, "measured") == FIT - {"VILA1.5-3b int4"}
    (row,) = (row for row in rows if row["label"] == "failed")
    assert row["reason"] == "the process died of SIGSEGV"
    worker = FakeWorker()
    fill(worker)
    assert worker.built == ["VILA1.5-3b int4"], "it is tried again"


def test_a_full_disk_ends_the_table_and_keeps_the_rows(
    fill: Callable[..., list[Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(FakeWorker(problems={"VILA1.5-3b-s2 int4": VilaDeployError("any")}), minutes=3)
    kept = {f"{row['model']} {row['precision']}" for row in lines(tmp_path)
            if row["label"] == "measured"}  # fmt: skip

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("vila_deploy.bench.results_file.os.fsync", full)
        with pytest.raises(VilaDeployError, match=r"rows.jsonl: cannot write: No space left on"):
            fill(FakeWorker())
    worker = FakeWorker()
    assert titles(fill(worker), "measured") == FIT
    assert not kept & set(worker.built)


def test_no_room_on_the_disk_is_seen_before_building(fill: Callable[..., list[Row]]) -> None:
    worker = FakeWorker()
    rows = fill(worker, free_bytes=5_000_000_000)
    assert "VILA1.5-3b fp16" not in worker.built
    assert "VILA1.5-3b int4" in worker.built
    row = next(row for row in rows if (row["model"], row["precision"]) == ("VILA1.5-3b", "fp16"))
    assert row["label"] == "predicted"
    assert "no room on the disk" in row["reason"]


def test_users_engines_and_engines_of_another_target(
    fill: Callable[..., list[Row]], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    rows = [
        TableRow("VILA1.5-3b", "int4", tmp_path / "mine"),
        TableRow("tiny", "int4", tmp_path / "mine"),
        TableRow("other", "int4", tmp_path / "mine", problem="is for orin"),
        TableRow("NVILA-3B", "int4"),
    ]
    worker = FakeWorker()
    filled = fill(worker, rows=rows)
    assert [row["label"] for row in filled] == ["measured", "measured", "failed", "skipped"]
    assert worker.built == []
    assert filled[2]["reason"] == "is for orin"
    (without_time,) = fill(FakeWorker(), rows=rows[1:2], minutes=0, commit="c2")
    assert without_time["label"] == "skipped", "it can't be predicted either"


def test_no_figure_is_called_measured_that_was_not(fill: Callable[..., list[Row]]) -> None:
    worker = FakeWorker()
    rows = fill(worker, minutes=3)
    assert len(titles(rows, "measured")) == len(worker.measured)
    assert fill_table_module.MEASURED == "measured"


def test_progress_counts_the_estimated_seconds(tmp_path: Path) -> None:
    """A step a second, and at the end of each row what is left of its estimate."""
    steps: list[int] = []
    texts: list[str] = []

    def advance(text: str = "", count: int = 1) -> None:
        texts.append(text)
        steps.append(count)

    table = fake_table(tmp_path, FakeWorker())
    fill_table(table, results_file(tmp_path / "r"), advance)
    assert sum(steps) == expected_seconds(table, [])
    assert min(steps) == 0
    assert "row 5 of 10: VILA1.5-3b int4, building" in texts
    assert "row 5 of 10: VILA1.5-3b int4, measuring" in texts
    assert expected_seconds(fake_table(tmp_path, FakeWorker(), minutes=0), []) == 0
