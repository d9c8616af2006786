"""One engine of tiny-vila and one server for all tests of the room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import succeed
from tests.support.paths import TINY_VILA, TINY_VILA_EXAMPLE
from tests.support.serving import Running, serving


@pytest.fixture(scope="session")
def engine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    succeed("vila-build-engine", TINY_VILA, "--target", "cpu", "-o", folder / "tiny-vila")
    return folder / "tiny-vila"


@pytest.fixture(scope="session")
def server(engine_folder: Path) -> Iterator[Running]:
    with serving(engine_folder) as running:
        yield running


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Three images that tiny-vila answers about."""
    paths = sorted((TINY_VILA_EXAMPLE / "pictures").glob("*.png"))
    return [Image.open(path).convert("RGB") for path in paths]
