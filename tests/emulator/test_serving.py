"""vila-serve over a native engine of compiled kernels: several requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.emulator.capabilities import NEWEST
from tests.support.emulator.device import EmulatedDevice
from tests.support.serving import Case, Running, served_answers, serving
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native.slotted_session import SlottedSession
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.runtime.request import Event, Finished, GenerationRequest, OnEvent, Ticket

pytestmark = pytest.mark.slow
TOKENS, TIMEOUT_S = 5, 600


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_checkpoint(root / "c", heads=2, kv_heads=1, layers=1, quantized=True)
    options = BuildOptions(
        "h100", backend="native", max_seq_len=256, kernel_launch="merged-attention"
    )  # fmt: skip
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
    return [("Why?", []), ("What is it?", [Image.fromarray(values)]), ("And where is it now?", [])]


@pytest.fixture(scope="module")
def alone(engine: Path, cases: list[Case]) -> dict[int, list[int]]:
    """Tokens that each is answered with by an engine of one slot, by its prompt's length."""
    sampling = SamplingParams(max_new_tokens=TOKENS)
    with open_engine(engine) as opened:
        answers = [opened.chat().ask(text, images, sampling) for text, images in cases]
    assert len({tuple(answer.tokens) for answer in answers}) == len(cases), "would show nothing"
    found = {answer.prompt_tokens: answer.tokens for answer in answers}
    assert len(found) == len(cases)
    return found


@pytest.fixture
def served(server: Running, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Tokens that requests have ended with, by their prompt's length."""
    found: dict[int, list[int]] = {}
    submit = server.api.scheduler.submit

    def submit_and_note(request: GenerationRequest, on_event: OnEvent) -> Ticket:
        def note(event: Event) -> None:
            if isinstance(event, Finished):
                found[event.prompt_tokens] = list(event.tokens)
            on_event(event)

        return submit(request, note)

    monkeypatch.setattr(server.api.scheduler, "submit", submit_and_note)
    return found


@pytest.mark.parametrize("at_once", [2, 3])
def test_each_request_gets_its_own_tokens(
    server: Running,
    cases: list[Case],
    alone: dict[int, list[int]],
    served: dict[int, list[int]],
    at_once: int,
) -> None:
    before = server.api.scheduler.stats()
    answers = served_answers(server, cases[:at_once], TOKENS, at_once, TIMEOUT_S)
    assert [tokens for _, tokens in answers] == [TOKENS] * at_once
    assert served == dict(list(alone.items())[:at_once])
    after = server.api.scheduler.stats()
    steps, rows = (
        getattr(after, name) - getattr(before, name) for name in ("decode_steps", "decoded_rows")
    )
    assert rows > steps, "no step decoded two of them"
