"""A stand-in of the hub with one small checkpoint, and an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import Hub, serve_hub, use_hub
from tests.support.tiny import make_checkpoint


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the hub serves as Lab/Tiny."""
    return make_checkpoint(tmp_path_factory.mktemp("served") / "root", shards=2)


@pytest.fixture
def hub(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serve_hub() as hub:
        hub.repositories["Lab/Tiny"] = served
        with use_hub(hub, tmp_path / "cache"):
            yield hub
