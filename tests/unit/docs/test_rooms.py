"""README's map and CONTRIBUTING's rooms name the folders that there are."""

from __future__ import annotations

import re

from tests.support.documents import blocks
from tests.support.paths import REPOSITORY

LINKED = {"kernels", "engines"}
ROOMS = {path.parent.name for path in (REPOSITORY / "vila_deploy").glob("*/__init__.py")}


def test_map_in_readme() -> None:
    (tree,) = [b for b in blocks(REPOSITORY / "README.md", "") if "vila_deploy/\n" in b.text]
    assert set(re.findall(r"^  (\w+)/ ", tree.text, re.M)) == ROOMS - LINKED
    top = set(re.findall(r"^(\w+)/", tree.text, re.M))
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    assert top <= folders
    assert top >= {"vila_deploy", "kernels", "engines", "benchmarks", "docs", "examples", "tests"}


def test_rooms_in_contributing() -> None:
    (rooms, *_) = blocks(REPOSITORY / "CONTRIBUTING.md", "")
    assert sorted(rooms.text.split()) == sorted(ROOMS)


# Path: most files to open; the last is on two computers, 12 and 3.
PATHS = {"quantize": 12, "Calibration": 6, "build-engine": 15, "serve": 12, "vllm": 9}


def test_paths_in_contributing_are_short() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    _, *parts = text[text.index("## Follow a path") : text.index("## Rules")].split("\n**")
    assert len(parts) == len(PATHS)
    for part, (name, most) in zip(parts, PATHS.items(), strict=True):
        assert name in part.splitlines()[0]
        assert 0 < len(re.findall(r"^\d+\. \[", part, re.M)) <= most
