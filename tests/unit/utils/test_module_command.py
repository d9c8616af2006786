"""Processes of our own run this package, not what the user's folder happens to hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from vila_deploy.backends.native.compile import compile_engine
from vila_deploy.backends.tensorrt.compile_worker import CompileWorker
from vila_deploy.checkpoint.presets import preset
from vila_deploy.cli.bench_worker import measure_in_subprocess
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(autouse=True)
def folder_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder that holds another vila_deploy, such as a checkout."""
    (tmp_path / "vila_deploy").mkdir()
    (tmp_path / "vila_deploy" / "__init__.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)


def test_measuring(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure_in_subprocess(Path("nowhere"))
    assert "nowhere: no such folder" in capfd.readouterr().err


def test_compiling_kernels() -> None:
    assert compile_engine(preset("VILA1.5-3b", "int4").llm, 64, (), only=("none",)) == []


def test_compiling_in_a_worker(tmp_path: Path) -> None:
    with (
        CompileWorker(tmp_path, "vision") as worker,
        pytest.raises((VilaDeployError, OSError)) as raised,
    ):
        worker.versions()
    assert "another one" not in str(raised.value)
