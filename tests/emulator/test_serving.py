"""vila-serve over a native engine of compiled kernels: several requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.emulator.capabilities import NEWEST
from tests.support.emulator.device import EmulatedDevice
from tests.support.serving import Case, Running, chat_answers, served_answers, serving
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native.slotted_session import SlottedSession
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions

pytestmark = pytest.mark.slow
TOKENS, TIMEOUT_S = 5, 600


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_checkpoint(root / "c", heads=2, kv_heads=1, layers=1, quantized=True)
    options = BuildOptions("h100", backend="native", max_seq_len=160)
    build_engine(root / "c", root / "engine", options)
    return root / "engine"


@pytest.fixture(autouse=True)
def _capability(emulated_device: EmulatedDevice) -> None:
    emulated_device.capability = NEWEST


@pytest.fixture(scope="module")
def server(engine: Path) -> Iterator[Running]:
    from tests.support.emulator.plugin import DEVICE

    DEVICE.capability = NEWEST
    with serving(engine, slots=3) as running:
        assert isinstance(running.engine.session, SlottedSession)
        yield running


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Questions of different lengths, one of them about an image."""
    values = np.random.default_rng(0).integers(0, 256, (42, 42, 3), np.uint8)
    return [("Why?", []), ("What is it?", [Image.fromarray(values)]), ("And where is that?", [])]


@pytest.mark.parametrize("at_once", [2, 3])
def test_each_request_gets_its_own_tokens(
    engine: Path, server: Running, cases: list[Case], at_once: int
) -> None:
    asked = cases[:at_once]
    expected = chat_answers(engine, asked, TOKENS)
    assert len(set(expected)) == at_once, "equal answers would show nothing"
    before = server.api.scheduler.stats()
    assert served_answers(server, asked, TOKENS, at_once, TIMEOUT_S) == expected
    after = server.api.scheduler.stats()
    steps, rows = (
        getattr(after, name) - getattr(before, name) for name in ("decode_steps", "decoded_rows")
    )
    assert rows > steps, "no step decoded two of them"
