"""Embeddings that stay on the device between the tower and the language model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.native_cases import built
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import open_session
from vila_deploy.backends.native.slotted_session import SlottedSession
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.session import KeepsOnDevice, Session
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prefill import prefill_steps
from vila_deploy.runtime.prompt import Message, Prompt, prepare_prompt

Engine = tuple[Path, Manifest, Path]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("on_device")
    checkpoint = make_checkpoint(root / "c", heads=2, kv_heads=1, layers=1)
    with pytest.MonkeyPatch.context() as patch:
        manifest = built(root / "engine", open_checkpoint(checkpoint), patch, 256)
    return root / "engine", manifest, checkpoint


@pytest.fixture(params=["one slot", "two slots"])
def session(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Session]:
    folder, manifest, _ = engine
    opened: Session = (
        open_session(folder, manifest) if request.param == "one slot"
        else SlottedSession(folder, manifest, 2)
    )  # fmt: skip
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def prompt(engine: Engine) -> Prompt:
    checkpoint = open_checkpoint(engine[2])
    tokenizer = load_tokenizer(engine[2] / "llm")
    model = ModelInfo.from_config(checkpoint.config, tokenizer)
    values = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    messages = [Message("user", (Image.fromarray(values), "What is it?"))]
    return prepare_prompt(messages, model, tokenizer)


def last_logits(session: Session, prompt: Prompt, images: ImageCache) -> np.ndarray:
    session.keep(0, 0)
    *_, last = prefill_steps(session, 0, prompt, 0, images, lambda: 64)
    assert last.logits is not None
    return last.logits


def test_features_come_to_the_host_behind_the_first_piece(
    session: Session, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are what the tower gives the host; so are the logits of a prompt out of either."""
    events: list[Any] = []
    to_host, append = torch.Tensor.cpu, type(session).prefill_on_device  # type: ignore[attr-defined]

    def cpu(self: torch.Tensor) -> torch.Tensor:
        events.append(tuple(self.shape))
        return to_host(self)

    def prefill_on_device(self: Any, *arguments: Any) -> Any:
        events.append("prefill")
        return append(self, *arguments)

    assert isinstance(session, KeepsOnDevice)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(type(session), "prefill_on_device", prefill_on_device)
    images = ImageCache()
    logits = last_logits(session, prompt, images)
    (image,) = prompt.images
    held = images.get(image.digest)
    assert held is not None
    assert events[0] == "prefill"
    assert events.count(held.shape) == 1
    monkeypatch.undo()
    whole = np.concatenate(session.encode_images(image.pixels.tiles, image.pixels.grid))
    np.testing.assert_array_equal(held, whole)
    # Out of the cache they come from the host.
    np.testing.assert_array_equal(last_logits(session, prompt, images), logits)
    assert images.hits == 2


def test_parts_of_host_and_device_become_one_prompt(session: Session) -> None:
    assert isinstance(session, KeepsOnDevice)
    rows = np.random.default_rng(1).standard_normal((3, 128), np.float32)
    on_device = session.embed_on_device([[5, 6]])
    found = session.to_host(session.embed_on_device([[3], rows, on_device[1:]]))
    expected = [session.embed_tokens([3]), rows, session.embed_tokens([6])]
    np.testing.assert_array_equal(found, np.concatenate(expected))
