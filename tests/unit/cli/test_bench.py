"""vila-bench's output: where the table goes and how it is written."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vila_deploy.cli import bench as bench_module
from vila_deploy.cli import bench_worker
from vila_deploy.cli.bench import main

ROW: dict[str, Any] = {
    "label": "measured",
    "model": "tiny",
    "precision": "int4",
    "target": "cpu",
    "backend": "onnxruntime",
    "device": "some CPU",
    "weights": "trained",
    "decode_tokens_per_s": 12.5,
    "ttft_ms": {"preprocess": 1.0, "vision": 2.0, "prefill": 3.0, "total": 6.0},
    "peak_memory_bytes": 1e8,
    "weight_bytes_per_token": 1e6,
    "read_bandwidth_bytes_per_s": 2e10,
    "bandwidth_label": "measured",
    "roofline_fraction": 0.5,
}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The engines that were measured, without doing it."""
    engines: list[Path] = []
    monkeypatch.setattr(
        bench_worker, "measure_in_subprocess", lambda engine: engines.append(engine) or ROW
    )
    return engines


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_the_table_is_printed_as_markdown() -> None:
    done = bench("one", "two")
    assert done.exit_code == 0
    assert done.stdout.startswith("| model |")
    assert done.stdout.count("| tiny ") == 2


@pytest.mark.parametrize("flags", [["--json"], ["--format", "json"], ["-o", "json"]])
def test_json_is_a_list_of_rows(flags: list[str]) -> None:
    """The last spelling is that of version 0.1.0."""
    assert json.loads(bench("one", *flags).stdout) == [ROW]
    assert not Path("json").exists()


def test_out_is_a_path(tmp_path: Path) -> None:
    for name, flags in (("a.md", []), ("b.csv", []), ("c.txt", ["--format", "csv"])):
        done = bench("one", "-o", tmp_path / name, *flags)
        assert done.stdout == f"{tmp_path / name}: 1 rows\n"
    assert (tmp_path / "a.md").read_text().startswith("| model |")
    for name in ("b.csv", "c.txt"):
        with (tmp_path / name).open() as file:
            (row,) = csv.DictReader(file)
        assert row["ttft_ms.total"] == "6.0"
    assert bench("one", "-o", tmp_path / "d.json").exit_code == 0
    assert json.loads((tmp_path / "d.json").read_text()) == [ROW]


def test_a_bad_place_is_refused_before_any_work(tmp_path: Path, measured: list[Path]) -> None:
    (tmp_path / "old.md").write_text("mine")
    done = bench("one", "-o", tmp_path / "old.md")
    assert done.exit_code == 1
    assert "old.md: output file exists" in done.stderr
    assert "folder does not exist" in bench("one", "-o", tmp_path / "no" / "a.md").stderr
    assert (tmp_path / "old.md").read_text() == "mine"
    assert not measured


def test_a_file_may_be_called_like_a_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench("one", "--json", "-o", "csv").exit_code == 0
    assert json.loads(Path("csv").read_text()) == [ROW]


def test_two_formats_are_wrong_usage() -> None:
    done = bench("one", "--json", "--format", "csv")
    assert done.exit_code == 2
    assert "contradict" in done.stderr


def test_the_old_spelling_is_hidden() -> None:
    assert "-o, --out FILE" in bench("--help").stdout


def test_a_table_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring took minutes."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bench_module, "write_file", full)
    done = bench("one", "-o", tmp_path / "table.md")
    assert done.exit_code == 1
    assert done.stdout.startswith("| model |")
    assert done.stderr.startswith("error: No space left on device")
    assert list(tmp_path.iterdir()) == []
