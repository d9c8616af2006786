""".ci/run: which targets a commit makes it run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

ROWS = re.findall(r'^  "([\w-]+): (.*)"$', (REPOSITORY / ".ci" / "run").read_text(), re.M)
ALL = ["test", *(target for target, _ in ROWS)]
OF_THE_SERVER = [
    "test",
    *(target for target, paths in ROWS if "vila_deploy/server" in paths.split()),
]
MAKEFILE = "%:\n\t@echo ran $@\n"
AS_SOMEBODY = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *AS_SOMEBODY, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, *names: str) -> None:
    """Commit new text in the files `names`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + "x\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-m", "x")


def ran(folder: Path) -> list[str]:
    done = subprocess.run([folder / ".ci" / "run"], check=True, capture_output=True, text=True)
    return [line.removeprefix("ran ") for line in done.stdout.splitlines() if "ran " in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with our .ci/run, a Makefile that names its targets, and two commits."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text(MAKEFILE)
    git(tmp_path, "init", "-b", "main")
    commit(tmp_path, "vila_deploy/server/app.py", "README.md")
    commit(tmp_path, "README.md")
    return tmp_path


def test_a_change_elsewhere_runs_make_test_alone(checkout: Path) -> None:
    assert ran(checkout) == ["test"]


@pytest.mark.parametrize("path", ["vila_deploy/server/page/new.js", "vila_deploy/runtime/a.py"])
def test_a_change_of_what_a_target_tests_runs_it(checkout: Path, path: str) -> None:
    commit(checkout, path)
    assert ran(checkout) == OF_THE_SERVER
    commit(checkout, "README.md")
    assert ran(checkout) == ["test"]
    # Not committed yet, as when somebody runs it by hand.
    (checkout / "vila_deploy" / "server" / "app.py").write_text("y\n")
    assert ran(checkout) == OF_THE_SERVER


def test_a_merge_is_compared_with_each_parent(checkout: Path) -> None:
    git(checkout, "checkout", "-b", "topic")
    commit(checkout, "vila_deploy/server/app.py")
    git(checkout, "checkout", "main")
    commit(checkout, "README.md")
    git(checkout, "merge", "topic")
    assert ran(checkout) == OF_THE_SERVER


@pytest.mark.parametrize("lost", ["parents", "git"])
def test_what_cannot_be_told_runs_everything(checkout: Path, tmp_path: Path, lost: str) -> None:
    copy = tmp_path / "copy"
    git(checkout, "clone", "--depth", "1", f"file://{checkout}", str(copy))
    if lost == "git":
        shutil.rmtree(checkout / ".git")
        shutil.rmtree(copy / ".git")
    assert ran(copy) == ALL


def test_rows_are_read() -> None:
    assert {"test-web", "test-serve"} <= set(OF_THE_SERVER) <= set(ALL)


def test_a_failing_target_fails(checkout: Path) -> None:
    (checkout / "Makefile").write_text(MAKEFILE + "test-web:\n\t@exit 3\n")
    with pytest.raises(subprocess.CalledProcessError):
        ran(checkout)
