"""An engine for Triton's server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.paths import TINY_VILA
from vila_deploy import build_engine


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-vila on the CPU; in test_trtllm.py it answers for TensorRT-LLM's engine."""
    out = tmp_path_factory.mktemp("engine") / "tiny"
    build_engine(TINY_VILA, out, target="cpu", precision="fp16")
    return out
