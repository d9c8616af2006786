"""The filled table as text and plots: every figure says what it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.bench_table import BANDWIDTH, FakeWorker, fake_table, measured_row, results_file
from vila_deploy.bench.fill_table import fill_table
from vila_deploy.bench.plots import write_plots
from vila_deploy.bench.table_markdown import device_cell, render_table, speed_cell
from vila_deploy.utils.errors import VilaDeployError

Row = dict[str, Any]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """3 minutes on a computer with 22 GB: rows of every kind."""
    monkeypatch.setattr("vila_deploy.engine.memory.available_memory_bytes", lambda: 22 * 10**9)
    worker = FakeWorker(problems={"VILA1.5-3b-s2 int4": VilaDeployError("it died")})
    table = fake_table(tmp_path, worker, minutes=3)
    return fill_table(table, results_file(tmp_path / "r"), lambda text="", steps=1: None)


def line(text: str, model: str, precision: str) -> list[str]:
    (first, *_) = (x for x in text.splitlines() if x.startswith(f"| {model} | {precision} |"))
    return [cell.strip() for cell in first.strip("|").split("|")]


def test_the_authors_shape(rows: list[Row]) -> None:
    text = render_table(rows)
    cells = line(text, "VILA1.5-3b", "int4")
    assert cells[2:5] == ["**15.0** (14.0–16.0)", "**15.0** (14.0–16.0)", "50%"]
    published, expected, limits = zip(*(cell.split(" / ") for cell in cells[5:]), strict=True)
    assert published == ("182.8", "215.5", "42.5", "–", "–")
    assert limits == ("1049", "680", "138", "2260", "3238")
    assert all(float(p) < float(limit) for p, limit in zip(expected, limits, strict=True))
    # Where this computer has the memory to check an int8 tower, it is planned.
    needed = line(text, "VILA1.5-40b", "int4")[2]
    assert needed in ("OOM: 45.0 of 22.0 GB", "OOM: 28.5 of 22.0 GB")
    large = line(text, "VILA1.5-40b", "fp16")[5:]
    assert large[:3] == ["OOM / OOM / 23", "OOM / OOM / 15", "not given / OOM / 3"]
    assert large[4].split(" / ")[1].isdigit(), "an H200 has room for it"
    assert line(text, "VILA1.5-3b-s2", "int4")[2] == "failed"
    predicted = line(text, "VILA1.5-13b", "int4")
    assert predicted[2].startswith("predicted ")
    assert predicted[4] == "assumed 50%"
    assert "- VILA1.5-3b-s2 int4: failed: it died" in text
    assert "- VILA1.5-13b int4: predicted: would take about" in text
    gigabytes = needed.split()[1]
    words = f"out of memory: needs {gigabytes} GB of memory, 22.0 GB are there"
    assert f"- VILA1.5-40b int4: {words}" in text
    assert "Noisy" not in text
    assert "commit c0" in text
    assert f"Memory bandwidth, measured: {BANDWIDTH / 1e9:.1f} to" in text


def test_a_bold_figure_is_a_measured_one(rows: list[Row]) -> None:
    for row in rows:
        assert ("**" in speed_cell(row, "image")) == (row["label"] == "measured")


def test_time_to_first_token_of_measured_rows(rows: list[Row]) -> None:
    text = render_table(rows).partition("## Time to first token")[2]
    cells = line(text, "VILA1.5-3b", "int4")
    assert cells[2:] == ["0.01", "3.00", "5.00", "8.01", "51.2", "4.0", "4.60", "4.70"]
    assert "| VILA1.5-13b | int4 |" not in text


def test_a_noisy_host_is_said() -> None:
    row = {"model": "VILA1.5-3b", "precision": "int4", **measured_row(), "noisy": False}
    quiet = {**row, "precision": "fp16", "noisy": False, "noise": []}
    noisy = {**row, "noisy": True, "noise": ["one", "two"], "stolen_cores": 0.25}
    text = render_table([noisy, quiet])
    assert "**Noisy host**" in text
    assert "\n- VILA1.5-3b int4: one; two\n" in text
    assert "- VILA1.5-3b fp16" not in text
    assert "Stolen by other guests of the host: up to 0.25 of a core." in text
    earlier = {key: value for key, value in noisy.items() if key not in ("noise", "stolen_cores")}
    assert "more than 10% of a core" in render_table([earlier]), "rows of earlier versions"


def test_fewer_tokens_and_energy_are_said() -> None:
    row = {"model": "VILA1.5-3b", "precision": "int4", **measured_row(), "noisy": False}
    row["decode"]["image"]["tokens"] = 20
    text = render_table([{**row, "energy_joules": 120.4}])
    assert "VILA1.5-3b int4: 20 tokens a repetition" in text
    assert "energy of the measurement J" in text
    assert "| 120 |" in text


def test_models_without_known_shapes_have_their_published_figures() -> None:
    assert device_cell("NVILA-3B", "int4", "a100") == "184.3 / – / –"
    assert device_cell("tiny", "int4", "a100") == "– / – / –"


def test_contexts_have_a_table() -> None:
    row = {"model": "VILA1.5-3b", "precision": "int4", **measured_row(), "noisy": False}
    points = [{**row["decode"]["image"], "context": context} for context in (0, 256)]
    text = render_table([{**row, "contexts": points}])
    assert "| model | precision | 0 | 256 |" in text


def test_plots(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = write_plots(rows, tmp_path)
    assert {path.name for path in files} == {
        f"{name}.{ending}" for name in ("decode-speed", "first-token") for ending in ("svg", "png")
    }
    assert all(path.stat().st_size > 1000 for path in files)


def test_without_matplotlib_one_line_says_how_to_get_plots(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(VilaDeployError, match=r"matplotlib.*pip install '\.\[plots\]'"):
        write_plots(rows, tmp_path)
