"""Engine folders with steps left for a device, whose manifest is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import assert_one_line, invoke


@pytest.mark.parametrize("backend", [[], {}, 7, None, "tensorrt"])
@pytest.mark.parametrize("needs", [["a step"], [7], {"a": 1}, [{"id": "../..", "title": "?"}]])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, backend: Any, needs: Any) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    manifest = {"format_version": 2, "backend": backend, "needs": needs, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    line = assert_one_line(invoke("vila-build-engine", folder, "--target", "orin"))
    assert "manifest.json: was altered" in line
