"""What is wrong before a run on a GPU begins is one line, and nothing has begun then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import preflight
from benchmarks.gpu.rows import append, read
from tests.support.paths import REPOSITORY
from vila_deploy.utils.errors import VilaDeployError

SCRIPT = REPOSITORY / "benchmarks" / "gpu" / "first_run.sh"
ROW = {"kind": "check", "name": "head 3B", "agrees": False}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "usage: OUT=FOLDER"),
        (("3",), {"OUT": "x"}, "usage: "),
        (("1", "2"), {"OUT": "x"}, "usage: "),
        (("1",), {}, "error: OUT is not set"),
        (("1",), {"OUT": "x", "PYTHON": "/no/python"}, "error: PYTHON=/no/python is no"),
        (("1",), {"OUT": "x", "PYTHON": "false"}, "error: PYTHON=false is no Python 3.11"),
    ],
)
def test_the_script_refuses_to_lose_rows(
    arguments: tuple[str, ...], environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_folders_are_named_from_where_the_script_is_called(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        [SCRIPT, "2"], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "./python", "OUT": "rows", "FIRST": "first"},
    )  # fmt: skip
    assert done.returncode == 2
    assert f"FIRST={tmp_path}/first: call 1 left no rows.jsonl here" in done.stderr
    assert (tmp_path / "rows" / "log.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only steps,bla", "there is no stage 'bla'; choose from machine"),
        ("--only probe", "there is no stage 'probe'"),
        ("--limit-s abc", "give a number above 0, not 'abc'"),
        ("--limit-s 0", "give a number above 0, not '0'"),
        ("--slower -1", "give a number above 0, not '-1'"),
        ("--slower nan", "give a number above 0, not 'nan'"),
        ("--call 3", "invalid choice: '3'"),
        ("--call 2 --first FOLDER/none", "call 1 left no rows.jsonl here"),
        ("--out FOLDER/file/rows.jsonl", "rows can't be written (File exists)"),
        ("--out /proc/none/rows.jsonl", "rows can't be written"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments.replace("FOLDER", str(tmp_path)).split()])
    assert command.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert len(said.err.splitlines()) == 1


def test_a_python_without_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PACKAGES", ("sys", "no_such_package"))
    with pytest.raises(VilaDeployError, match="has no no_such_package; name another one in PYTHON"):
        preflight.check_packages()


def test_baselines_that_are_named_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fine in ("", os.devnull, str(tmp_path)):
        monkeypatch.setenv("VILA_DEPLOY_BASELINES", fine)
        preflight.check_baselines()
    monkeypatch.setenv("VILA_DEPLOY_BASELINES", str(tmp_path / "none"))
    with pytest.raises(VilaDeployError, match="none: there is no such folder of baselines"):
        preflight.check_baselines()


def test_kernels_need_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    preflight.check_cache()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(VilaDeployError, match="kernels can't be kept here"):
        preflight.check_cache()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        preflight.open_log(tmp_path),
        pytest.raises(VilaDeployError, match="another run writes its rows here"),
    ):
        preflight.open_log(tmp_path)
    preflight.open_log(tmp_path).close()


def test_a_second_call_takes_the_first_ones_rows_once(tmp_path: Path) -> None:
    """Begun again in its folder, or in that of the first call, it doesn't take them again."""
    first, out = tmp_path / "first", tmp_path / "second" / "rows.jsonl"
    first.mkdir()
    out.parent.mkdir()
    append(first / "rows.jsonl", ROW)
    assert preflight.take_first_call(first, out) == []
    append(out, {**ROW, "agrees": True})
    preflight.take_first_call(first, out)
    preflight.take_first_call(first, first / "rows.jsonl")
    assert [row["agrees"] for row in read(out)] == [False, True]
    assert len(read(first / "rows.jsonl")) == 1
    assert preflight.take_first_call(None, out) == []
    (warning,) = preflight.take_first_call(None, tmp_path / "rows.jsonl")
    assert warning.startswith("FIRST is not set")
