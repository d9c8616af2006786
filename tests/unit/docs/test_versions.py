"""README's table of versions says what pyproject.toml and the targets say."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.support.paths import REPOSITORY
from vila_deploy.backends.tensorrt_llm import releases
from vila_deploy.engine.target import get_target

README = (REPOSITORY / "README.md").read_text("utf-8")
VERSIONS = README[README.index("## Versions") : README.index("## Repository map")]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
NAMES = {"torch": "PyTorch", "triton": "Triton"}


@pytest.mark.parametrize("package", ["torch", "transformers", "tensorrt-rtx", "triton"])
def test_least_version(package: str) -> None:
    extras = PROJECT["optional-dependencies"]
    required = [*PROJECT["dependencies"], *extras["tensorrt"], *extras["native"]]
    (version,) = re.findall(rf"^{package}>=([\d.]+)", "\n".join(required), re.M)
    assert f"{NAMES.get(package, package)} ≥ {version.removesuffix('.0')}" in VERSIONS


def test_python_version() -> None:
    assert f"Python ≥ {PROJECT['requires-python'].removeprefix('>=')}" in VERSIONS


def test_releases_of_tensorrt_llm() -> None:
    assert f"TensorRT-LLM {releases.DESKTOP.title}" in VERSIONS
    assert releases.JETSON.title.split()[-1] in VERSIONS


@pytest.mark.parametrize("name", ["orin", "h100"])
def test_tensorrt_of_the_device(name: str) -> None:
    needs = get_target(name).backends["tensorrt"]
    version = re.search(r"TensorRT ([\d.]+)", needs)
    assert version
    assert version[1] in VERSIONS
