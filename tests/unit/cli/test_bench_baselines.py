"""vila-bench --table --baselines: a checkout is needed, and nothing that fails takes the table."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vila_deploy.cli import bench_baselines
from vila_deploy.cli.bench import main

ABOUT: dict[str, Any] = {
    "model": "VILA1.5-3b", "precision": "int4", "label": "measured", "noisy": False, "round": 1,
}  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {**ABOUT, "what": "vila-deploy", "decode_0_ms": 50.0},
    {**ABOUT, "what": "llama.cpp", "decode_0_ms": 60.0},
]


def checkout(folder: Path, program: str) -> Path:
    """A checkout whose benchmark is `program`."""
    package = folder / "benchmarks" / "cpu_baselines"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(program)
    return folder


def table(results: Path) -> tuple[int, str]:
    arguments = ["--table", "--baselines", "--minutes", "0", "--target", "cpu"]
    done = CliRunner().invoke(main, [*arguments, "--results", str(results)])
    return done.exit_code, done.output


def test_an_installed_package_says_that_it_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_baselines, "CHECKOUT", tmp_path)
    code, output = table(tmp_path / "results")
    assert code == 1
    assert "--baselines needs a checkout" in output
    assert not (tmp_path / "results").exists(), "it is said before any work"


def test_what_a_benchmark_gave_before_it_died_stands_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"""
import json, os
for row in {ROWS!r}:
    print(json.dumps(row), flush=True)
os._exit(3)
"""
    monkeypatch.setattr(bench_baselines, "CHECKOUT", checkout(tmp_path, program))
    code, output = table(tmp_path / "results")
    assert code == 0, output
    assert "## Decode tokens/s" in output
    assert "| decode at context 0 | 50 ms | 60 ms | 1.20 |" in output
    assert "- benchmarks.cpu_baselines: skipped: ended with code 3" in output
    lines = (tmp_path / "results" / "baselines.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][:2] == ROWS


def test_an_interruption_ends_the_benchmark_which_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned = tmp_path / "cleaned"
    program = f"""
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("{{}}", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path({str(cleaned)!r}).touch()
"""
    monkeypatch.setattr(bench_baselines, "CHECKOUT", checkout(tmp_path, program))
    rows = bench_baselines.cpu_rows([], tmp_path)
    assert isinstance(rows, Generator)
    assert next(rows) == {}
    rows.close()
    assert cleaned.exists()
