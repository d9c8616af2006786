"""What `pip install .` installs: everything that the commands need, wherever they are run."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves folders beside the sources."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        if not name.startswith(("tests/", "examples/")) and (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, copy]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_targets_kernels_and_calibration_are_inside(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for target in (REPOSITORY / "engines").glob("*.toml"):
        assert f"vila_deploy/engines/{target.name}" in names
    assert "vila_deploy/kernels/__init__.py" in names
    assert "vila_deploy/quantize/calibration/passages.txt" in names
    sources = {f"vila_deploy/{p.relative_to(REPOSITORY / 'vila_deploy').as_posix()}"
               for p in (REPOSITORY / "vila_deploy").rglob("*.py")}  # fmt: skip
    assert sources <= names
    assert not [name for name in names if name.startswith(("kernels/", "engines/", "tests/"))]


def test_commands_run_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked into an empty folder and found before anything else, away from the sources."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        entry_points = archive.read(
            next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        ).decode()
    code = (
        "import sys, vila_deploy; from vila_deploy.cli.build_engine import main\n"
        f"assert vila_deploy.__file__.startswith({str(tmp_path)!r})\n"
        "main(['nowhere', '--target', 'toaster', '--plan'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "nowhere" in done.stderr, done.stderr
    for command in ("vila-quantize", "vila-build-engine", "vila-chat", "vila-bench"):
        assert command in entry_points
