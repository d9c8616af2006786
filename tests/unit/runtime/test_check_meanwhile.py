"""Large files are checked while an engine is opened; what is wrong with them is still said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.builder import build_engine
from vila_deploy.engine import manifest
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError

FILES = ("llm/model.data", "vision/model.data", "embed_tokens.npy", "llm/model.onnx")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    build_engine(make_checkpoint(root / "c", quantized=True), root / "e", "cpu")
    return root / "e"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("largest", [1, 1 << 20])
def test_an_altered_file_is_named(
    engine: Path, monkeypatch: pytest.MonkeyPatch, name: str, largest: int
) -> None:
    monkeypatch.setattr(manifest, "LARGE_FILE_BYTES", largest)
    path = engine / name
    original = path.read_bytes()
    changed = np.frombuffer(original, np.uint8).copy()
    changed[[0, len(changed) // 2]] ^= 255
    path.write_bytes(changed.tobytes())
    try:
        with pytest.raises(VilaDeployError, match="was altered") as caught:
            open_engine(engine)
        assert name in str(caught.value)
    finally:
        path.write_bytes(original)
    with open_engine(engine) as opened:
        assert opened.session.max_seq_len > 0
