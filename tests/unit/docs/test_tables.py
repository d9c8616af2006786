"""Tables of README and docs are what benchmarks/tables.py writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.page_tables import sources
from tests.support.bench_table import measured_row
from tests.support.paths import REPOSITORY
from vila_deploy.bench import predict


def test_no_page_is_stale() -> None:
    assert tables.stale() == [], "run python benchmarks/tables.py"


def test_a_changed_prediction_makes_its_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "PDL_GAP_S", 2 * predict.PDL_GAP_S)
    assert tables.stale() == [REPOSITORY / "docs" / "kernels.md"]


def test_a_changed_figure_makes_a_page_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sources.RESULTS.glob("*.jsonl"):
        text = path.read_text("utf-8")
        if path.stem == sources.CPU_TABLE:
            rows = [json.loads(line) for line in text.splitlines()]
            for row in rows:
                if row["label"] == "measured":
                    row["decode"]["image"]["tokens_per_s"] *= 2
            text = "\n".join(map(json.dumps, rows))
        (tmp_path / path.name).write_text(text, "utf-8")
    monkeypatch.setattr(sources, "RESULTS", tmp_path)
    sources.results.cache_clear()
    try:
        names = {path.relative_to(REPOSITORY).as_posix() for path in tables.stale()}
    finally:
        sources.results.cache_clear()
    assert names == {"README.md", "benchmarks/README.md"}


def test_a_run_of_the_authors_table_makes_its_page_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sources.RESULTS.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    board = {"device": "some board"}
    oom = {
        "label": "oom",
        **board,
        "needed_bytes": 2e10,
        "limit_bytes": 1e10,
        "reason": "too large",
    }
    measured = {"model": "VILA1.5-3b", "precision": "int4", **measured_row()}
    rows = [
        {"model": "VILA1.5-40b", "precision": "int4", **oom},
        {**measured, **oom},
        measured | board,
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "authors-table-some-board.jsonl").write_text(text, "utf-8")
    monkeypatch.setattr(sources, "RESULTS", tmp_path)
    _, table = tables.TABLES["authors-table"]().split("### some board\n")
    lines = [line for line in table.splitlines() if line.startswith("| VILA1.5-")]
    assert len(lines) == 3, "two rows, of which one has a time to first token"
    assert lines[0].startswith("| VILA1.5-3b | int4 | **15.0** (14.0–16.0) |")
    assert lines[1].startswith("| VILA1.5-40b | int4 | OOM: 20.0 of 10.0 GB |")
    assert [path.name for path in tables.stale()] == ["README.md"]


def test_every_table_stands_on_a_page() -> None:
    texts = [path.read_text("utf-8") for path in tables.pages()]
    shown = {match["name"] for text in texts for match in tables.MARKED.finditer(text)}
    assert shown == set(tables.TABLES)
    assert sum(text.count("<!-- table:") for text in texts) == sum(
        len(tables.MARKED.findall(text)) for text in texts
    ), "a marker without its end"


def test_script_runs_without_torch() -> None:
    code = "import sys, benchmarks.tables as t; t.stale(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
    script = [sys.executable, "benchmarks/tables.py", "--check"]
    subprocess.run(script, cwd=REPOSITORY, check=True)
