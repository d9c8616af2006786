"""Models and engines that the end-to-end tests share, made by the real commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import succeed
from tests.support.paths import TINY_VILA


@pytest.fixture(scope="session")
def tiny_vila() -> Path:
    return TINY_VILA


@pytest.fixture(scope="session")
def tiny_awq(tiny_vila: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "awq"
    succeed("vila-quantize", tiny_vila, "-o", out)
    return out


@pytest.fixture(scope="session")
def tiny_engine(tiny_awq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "engine"
    succeed("vila-build-engine", tiny_awq, "--target", "cpu", "-o", out)
    return out


@pytest.fixture(scope="session")
def tiny_close_engine(tiny_awq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that rounds 4 bits and next to nothing else, to compare token by token."""
    out = tmp_path_factory.mktemp("tiny") / "close"
    options = ["--activations", "int8x2", "--lm-head", "fp16", "--vision", "fp16"]
    succeed("vila-build-engine", tiny_awq, "--target", "cpu", "-o", out, *options)
    return out
