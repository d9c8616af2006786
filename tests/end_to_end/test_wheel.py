"""An installed wheel, built from the source archive: every command, from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import vila_deploy
from tests.support.paths import REPOSITORY
from tests.support.tiny import make_checkpoint

COMMANDS = (
    "vila-quantize",
    "vila-convert",
    "vila-build-engine",
    "vila-chat",
    "vila-bench",
    "vila-serve",
)
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves folders beside the sources."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        source, target = REPOSITORY / name, copy / name
        if name.startswith(("tests/", "examples/")) or not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    subprocess.run([sys.executable, "-c", BUILD_SDIST, out], cwd=copy, check=True)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, sdist)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder in a new environment, which finds everything else in this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    paths = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    # Path files of a folder that a path file names are not read: nothing finds this checkout.
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others))
    pip("--python", environment / "bin" / "python", "install", "--no-deps", wheel)
    return environment / "bin"


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *map(str, arguments)], check=True)


def test_source_archive_and_wheel_hold_all_code_and_data(sdist: Path, wheel: Path) -> None:
    code = {f"vila_deploy/{path.relative_to(REPOSITORY / 'vila_deploy').as_posix()}"
            for path in (REPOSITORY / "vila_deploy").rglob("*.py")}  # fmt: skip
    code |= {f"vila_deploy/kernels/{path.name}" for path in (REPOSITORY / "kernels").glob("*.py")}
    data = {f"vila_deploy/engines/{path.name}" for path in (REPOSITORY / "engines").glob("*.toml")}
    for folder in ("calibration", "evaluation"):
        files = (REPOSITORY / "vila_deploy" / "data" / folder).iterdir()
        data |= {f"vila_deploy/data/{folder}/{path.name}" for path in files}
    data |= {f"vila_deploy/bench/published/{name}.csv" for name in ("speed", "accuracy")}
    page = (REPOSITORY / "vila_deploy" / "server" / "page").iterdir()
    data |= {f"vila_deploy/server/page/{path.name}" for path in page}
    expected = code | data | {"vila_deploy/py.typed"}
    assert len(data) > 10
    assert "vila_deploy/kernels/__init__.py" in code
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as tar:
        in_sdist = {name.partition("/")[2] for name in tar.getnames()}
    assert expected <= in_wheel
    assert expected <= in_sdist
    assert not [name for name in in_wheel if name.startswith(("kernels/", "engines/", "tests/"))]


def run(installed: Path, folder: Path, command: str, *arguments: object) -> str:
    """Run an installed command in `folder` and return its stdout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [installed / command, *map(str, arguments)], cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_have_the_packages_version(installed: Path, tmp_path: Path) -> None:
    assert vila_deploy.__version__ == version("vila-deploy")
    for command in COMMANDS:
        printed = run(installed, tmp_path, command, "--version")
        assert printed == f"{command} {vila_deploy.__version__}\n"
    code = "import vila_deploy; print(vila_deploy.__file__)"
    imported_from = run(installed, tmp_path, "python", "-c", code)
    assert imported_from.startswith(str(installed.parent)), "not the checkout"


def test_commands_run_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "c", max_length=1024)
    folder = tmp_path / "empty"
    folder.mkdir()

    def ask(command: str, *arguments: object) -> object:
        return json.loads(run(installed, folder, command, *arguments, "--json"))

    report = ask("vila-quantize", "../c", "-o", "q", "--algorithm", "rtn")
    assert report["algorithm"] == "rtn"
    converted = ask("vila-convert", "q", "--to", "compressed-tensors", "-o", "converted")
    assert converted == {"checkpoint": "converted", "formats": {"compressed-tensors": "converted"}}
    built = ask("vila-build-engine", "converted", "--target", "cpu", "-o", "engine")
    assert built["precision"] == "int4"
    answer = ask("vila-chat", "engine", "-p", "Hi", "--max-new-tokens", 3)
    assert len(answer["tokens"]) <= 3
    (row,) = ask("vila-bench", "engine")
    assert row["decode_tokens_per_s"] > 0
