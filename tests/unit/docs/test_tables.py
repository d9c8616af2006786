"""Tables of README and docs are what benchmarks/tables.py writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.page_tables import sources
from tests.support.paths import REPOSITORY


def test_no_page_is_stale() -> None:
    assert tables.stale() == [], "run python benchmarks/tables.py"


def test_a_changed_figure_makes_a_page_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sources.RESULTS.glob("*.jsonl"):
        text = path.read_text("utf-8")
        if path.name == "cpu.jsonl":
            first, *others = [json.loads(line) for line in text.splitlines()]
            first["decode_tokens_per_s"] *= 2
            text = "\n".join(map(json.dumps, [first, *others]))
        (tmp_path / path.name).write_text(text, "utf-8")
    monkeypatch.setattr(sources, "RESULTS", tmp_path)
    sources.results.cache_clear()
    try:
        names = {path.relative_to(REPOSITORY).as_posix() for path in tables.stale()}
    finally:
        sources.results.cache_clear()
    assert names == {"README.md", "benchmarks/README.md"}


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
