"""Which rows are noisy, by made-up readings, and how a table is marked by all its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.bench_table import BANDWIDTH, FakeWorker, fake_table, measured_row, results_file
from vila_deploy.bench.bandwidth import BandwidthReadings
from vila_deploy.bench.fill_table import fill_table
from vila_deploy.bench.noise import best_bandwidth, noise
from vila_deploy.cli.bench_table import _best_bandwidth

Row = dict[str, Any]


def read_at(bandwidth: float, **values: Any) -> Row:
    return {**measured_row(), "read_bandwidth_bytes_per_s": bandwidth, **values}


def with_speeds(least: float, median: float, most: float) -> Row:
    decode = {"tokens_per_s": median, "min_tokens_per_s": least, "max_tokens_per_s": most}
    return {**measured_row(), "decode": {"image": decode}}


def test_a_quiet_row_has_no_reason() -> None:
    assert noise(measured_row(), None) == []
    assert noise(measured_row(), BANDWIDTH) == []


@pytest.mark.parametrize(("share", "noisy"), [(0.91, False), (0.89, True), (0.4, True)])
def test_a_row_whose_memory_was_slower_is_noisy(share: float, noisy: bool) -> None:
    reasons = noise(read_at(share * 40e9), 40e9)
    assert bool(reasons) == noisy
    if noisy:
        expected = f"memory gave {share * 40:.1f} GB/s, {1 - share:.0%} less than the 40.0 GB/s"
        assert reasons == [f"{expected} that it can"]


def test_a_published_bandwidth_makes_nothing_noisy() -> None:
    gpu = read_at(1e9, bandwidth_readings=[])
    assert noise(gpu, 40e9) == []
    assert best_bandwidth([gpu]) is None


def test_others_and_repetitions_that_differ_are_reasons() -> None:
    busy = {**measured_row(), "others_before_cores": None, "others_during_cores": 0.3}
    assert noise(busy, None) == ["others took an unknown number of cores before it, 0.30 during it"]
    assert noise(with_speeds(9.4, 10.0, 10.8), None) == []
    assert noise(with_speeds(9.0, 10.0, 10.8), None) == ["repetitions differ by 18%"]


def test_the_best_is_of_all_rows_and_of_those_before_them() -> None:
    rows = [read_at(20e9), read_at(30e9, earlier_bandwidth_bytes_per_s=35e9), {"label": "oom"}]
    assert best_bandwidth(rows[:1]) == 20e9
    assert best_bandwidth(rows) == 35e9
    assert best_bandwidth([{"label": "predicted", "read_bandwidth_bytes_per_s": 9e9}]) is None


def test_a_later_row_shows_that_an_earlier_one_was_noisy(tmp_path: Path) -> None:
    worker = FakeWorker(bandwidth={"VILA1.5-3b int4": 0.7 * BANDWIDTH})
    rows = fill_table(fake_table(tmp_path, worker), results_file(tmp_path / "r"), lambda *_: None)
    noisy = [row for row in rows if row.get("noisy")]
    assert [(row["model"], row["precision"]) for row in noisy] == [("VILA1.5-3b", "int4")]
    lines = [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").open()]
    written = [
        row["noisy"] for row in lines if (row["model"], row["precision"]) == ("VILA1.5-3b", "int4")
    ]
    assert written == [False, True], "the first row to run, which nothing could be held against"


def test_a_fresh_run_is_held_against_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = fake_table(tmp_path, FakeWorker(), earlier_bandwidth=1.5 * BANDWIDTH)
    results = results_file(tmp_path / "r")
    rows = fill_table(table, results, lambda *_: None)
    measured = [row for row in rows if row["label"] == "measured"]
    assert all(row["noisy"] for row in measured)
    monkeypatch.setattr("vila_deploy.bench.conditions.processor_name", lambda: "some CPU")
    monkeypatch.setattr("vila_deploy.bench.conditions.usable_cores", lambda: 2)
    assert _best_bandwidth(tmp_path / "r") == 1.5 * BANDWIDTH
    monkeypatch.setattr("vila_deploy.bench.conditions.usable_cores", lambda: 4)
    assert _best_bandwidth(tmp_path / "r") is None, "another computer"


@pytest.mark.parametrize(("pause_s", "expected"), [(0.0, 2), (1e6, 1)])
def test_readings_keep_a_pause(pause_s: float, expected: int) -> None:
    readings = BandwidthReadings(1 << 20, pause_s)
    readings.read()
    readings.read()
    assert len(readings.readings) == expected
    assert readings.median() > 0


def test_the_median_of_the_readings_counts() -> None:
    readings = BandwidthReadings(1 << 20)
    readings.readings = [1.0, 5.0, 3.0]
    assert readings.median() == 3.0
