"""vila-bench --table with a real engine: rows, files, resuming, interruptions, wrong usage."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.bench_table import measured_row
from tests.support.paths import REPOSITORY
from tests.support.serving import wait_until
from tests.support.tiny import make_checkpoint
from vila_deploy.bench import estimates
from vila_deploy.bench.estimates import BUILD_BYTES_PER_S, disk_bytes_per_s
from vila_deploy.bench.fill_table import TimeLimit, TimeUp
from vila_deploy.bench.measure_row import MeasureSettings
from vila_deploy.bench.results_file import ResultsFile
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.cli import bench_table, bench_table_worker
from vila_deploy.cli.bench import main
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.module_command import module_command


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench-table")
    root = make_checkpoint(folder / "tiny", max_length=1024)
    build_engine(root, folder / "engine", BuildOptions("cpu"))
    return folder / "engine"


def table(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--table", *map(str, arguments)])


@pytest.fixture(scope="module")
def filled(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The results folder of a table in whose time only the small engine is measured."""
    folder = tmp_path_factory.mktemp("results") / "r"
    with pytest.MonkeyPatch.context() as patched:
        # Fast computers too expect released models to take longer than the time that there is.
        patched.setattr(estimates, "BUILD_BYTES_PER_S", 1e6)
        done = table(engine, "--minutes", 10, "--contexts", "0,64,2000", "--results", folder)
    assert done.exit_code == 0, done.output
    return folder, done


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_an_engine_is_measured_as_a_row_of_its_own(filled: tuple[Path, Result]) -> None:
    (row,) = (row for row in rows(filled[0]) if row["label"] == "measured")
    assert row["model"] == "tiny"
    assert set(row["decode"]) == {"image", "tinychat"}
    for decode in row["decode"].values():
        least, most = decode["min_tokens_per_s"], decode["max_tokens_per_s"]
        assert 0 < least <= decode["tokens_per_s"] <= most
        assert decode["repetitions"] == 5
        assert decode["tokens"] == 128
    assert row["decode"]["tinychat"]["context"] == 4
    assert row["decode"]["image"]["context"] == row["prompt_tokens"]
    assert [point["context"] for point in row["contexts"]] == [0, 64], "2000 tokens don't fit"
    assert row["ttft_ms"]["total"] == pytest.approx(
        sum(row["ttft_ms"][part] for part in ("preprocess", "vision", "prefill"))
    )
    assert row["resident_at_end_bytes"] > 10e6
    assert row["load_s"] > 0
    cached = row["decode"]["image"]["context"] + 64
    step = row["weight_bytes_per_token"] + cached * row["cache_bytes_per_token"]
    speed = row["decode"]["image"]["tokens_per_s"] / row["read_bandwidth_bytes_per_s"]
    assert row["roofline_fraction"] == pytest.approx(step * speed)
    assert isinstance(row["noisy"], bool)
    assert row["noisy"] == bool(row["noise"])
    assert row["bandwidth_readings"]
    for key in ("device", "state", "versions", "commit", "others_before_cores", "stolen_cores"):
        assert key in row


def test_the_other_rows_have_no_measured_figure(filled: tuple[Path, Result]) -> None:
    others = [row for row in rows(filled[0]) if row["model"] != "tiny"]
    assert {row["label"] for row in others} <= {"predicted", "oom"}
    assert len(others) == 10
    assert all(row["reason"] for row in others)


def test_files_of_the_results_folder(filled: tuple[Path, Result]) -> None:
    folder, done = filled
    assert {path.name for path in folder.iterdir()} >= {"rows.jsonl", "table.md", "table.csv"}
    assert not (folder / "work").exists()
    assert done.stdout.startswith((folder / "table.md").read_text("utf-8"))
    assert f"{folder}" in done.stdout.splitlines()[-1]
    listed = json.loads((folder / "table.json").read_text("utf-8"))
    assert len(listed) == 11
    with (folder / "table.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    speeds = [line["decode.tinychat.tokens_per_s"] for line in lines if line["model"] == "tiny"]
    assert float(speeds[0]) > 0
    assert "this computer is target cpu" in done.stderr


def test_the_same_command_keeps_what_was_measured(
    engine: Path, filled: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r"
    shutil.copytree(filled[0], folder)
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"torn')
    monkeypatch.setattr(bench_table_worker, "run_step", lambda *_: pytest.fail("measured again"))
    again = [engine, "--contexts", "0,64,2000", "--results", folder, "--json"]
    done = table(*again, "--minutes", 0)
    assert done.exit_code == 0, done.output
    (row,) = (row for row in json.loads(done.stdout) if row["model"] == "tiny")
    assert row["label"] == "measured"
    (row,) = (r for r in json.loads(table(*again, "--minutes", 0, "--fresh").stdout)
              if r["model"] == "tiny")  # fmt: skip
    assert row["label"] == "skipped"
    kept = rows(folder)
    assert len(kept) == 11, "those from before are forgotten"


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_table_leaves_its_rows_and_no_process(
    ending: signal.Signals, engine: Path, tmp_path: Path
) -> None:
    folder, pid = tmp_path / "r", tmp_path / "pid"
    command = module_command("tests.support.slow_bench", "--table", str(engine))
    environment = {"PYTHONPATH": str(REPOSITORY), "SLOW_BENCH_PID": str(pid)}
    process = subprocess.Popen(
        [*command, "--results", str(folder)], env={**os.environ, **environment},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not pid.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(ending)
    _, printed = process.communicate(timeout=300)
    if ending == signal.SIGTERM:
        assert process.returncode == 130
        assert printed.splitlines()[-1] == (
            f"interrupted: finished rows are kept in {folder}; the same command goes on"
        )
    worker = int(pid.read_text())
    wait_until(lambda: not Path(f"/proc/{worker}").exists())
    assert {row["label"] for row in rows(folder)} == {"oom"}


def test_a_worker_says_its_problem_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match=r"^\S+nothing: no such folder; give a folder"):
        run_step("measure", tmp_path / "nothing", seconds=60)


def test_a_worker_that_takes_too_long_is_ended(engine: Path) -> None:
    with pytest.raises(TimeUp):
        run_step("measure", engine, seconds=0.05)


def run_step(step: str, engine: Path, seconds: float) -> str:
    settings = json.dumps(MeasureSettings().to_json())
    limit = TimeLimit(seconds, lambda: None)
    return bench_table_worker.run_step([step, str(engine), settings], limit)


@pytest.mark.parametrize(
    ("code", "text"),
    [(-9, "the process died of SIGKILL; Linux ends"), (-11, "the process died of SIGSEGV")],
)
def test_a_worker_that_dies(code: int, text: str) -> None:
    assert bench_table_worker._problem(code, "").startswith(text)
    assert bench_table_worker._problem(1, "progress\nerror: disk full\n") == "disk full"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target", "orion"], "unknown target 'orion'; choose from"),
        (["no-such-engine"], "no-such-engine: no such folder"),
    ],
)
def test_wrong_names_are_one_line_before_any_work(
    arguments: list[str], text: str, tmp_path: Path
) -> None:
    done = table(*arguments, "--results", tmp_path / "r")
    assert done.exit_code == 1
    assert text in done.stderr.splitlines()[-1]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--minutes", "5", "engine"], "go with --table"),
        (["--contexts", "1", "engine"], "go with --table"),
        (["--table", "--model", "VILA1.5-3b"], "don't go with --table"),
        (["--table", "--contexts", "1,x"], "give numbers of tokens"),
        (["--table", "--minutes", "nan"], "must be a number"),
        (["--table", "--minutes", "-1"], "--minutes"),
        ([], "give either engine folders or --model, or --table"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert text in done.stderr


def test_two_tables_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    from vila_deploy.bench.results_file import ResultsFile

    with ResultsFile(tmp_path).lock():
        done = table("--minutes", 0, "--results", tmp_path)
    assert done.exit_code == 1
    assert "another vila-bench writes its results here" in done.stderr


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_table_that_can_not_be_written_leaves_the_earlier_one(
    tmp_path: Path, full_disk: None
) -> None:
    (tmp_path / "table.md").write_text("earlier")
    rows = [{**measured_row(), "model": "VILA1.5-3b", "precision": "int4"}]
    with pytest.raises(VilaDeployError, match="cannot write the table: File too large; free some"):
        bench_table._write_files(rows, ResultsFile(tmp_path), [])
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    assert (tmp_path / "table.md").read_text() == "earlier"


def test_a_disk_without_room_for_its_trial_is_no_error(tmp_path: Path, full_disk: None) -> None:
    assert disk_bytes_per_s(tmp_path) == BUILD_BYTES_PER_S
    assert not list(tmp_path.iterdir())
