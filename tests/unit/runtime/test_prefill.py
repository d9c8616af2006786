"""Images encoded tile by tile, prompts in chunks: the same as at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.scripted_session import ScriptedSession
from tests.support.tiny import make_checkpoint
from vila_deploy import Conversation, SamplingParams
from vila_deploy.builder import build_engine
from vila_deploy.checkpoint.config import load_config
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.session import OneSlot, chunk_size
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.runtime.prefill import encode_steps, prefill_steps
from vila_deploy.runtime.prompt import Message, prepare_prompt, prepare_question

S2: dict[str, Any] = {
    "image": 70,
    "scales": 2,
    "root_config": {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70},
    "preprocessor_config": {"size": {"height": 140, "width": 140}},
}


@pytest.mark.parametrize(("tiny", "tiles"), [({}, 1), (S2, 5)], ids=["one tile", "s2"])
def test_tiles_one_by_one_are_the_image(tmp_path: Path, tiny: dict[str, Any], tiles: int) -> None:
    make_checkpoint(tmp_path / "c", **tiny)
    build_engine(str(tmp_path / "c"), tmp_path / "e", "cpu", max_seq_len=320)
    values = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    image = Image.fromarray(values)
    with open_engine(tmp_path / "e") as engine:
        (prepared,) = prepare_question((image, "What?"), engine.model).images
        steps = list(encode_steps(engine.session, prepared.pixels))
        assert len(steps) == tiles
        assert all(step is None for step in steps[:-1])
        whole = engine.session.encode_images(prepared.pixels.tiles, prepared.pixels.grid)
        np.testing.assert_array_equal(steps[-1], np.concatenate(whole))
        assert engine.tokenizer is not None
        messages = [Message("user", (image, "What is on the river?"))]
        prompt = prepare_prompt(messages, engine.model, engine.tokenizer)
        expected = None
        for chunk in (256, 7, 2, len(prompt) - 1):
            engine.session.keep(0, 0)
            cache = ImageCache()
            *_, last = prefill_steps(engine.session, 0, prompt, 0, cache, lambda: chunk)  # noqa: B023
            expected = last.logits if expected is None else expected
            np.testing.assert_allclose(last.logits, expected, atol=1e-4)
            assert engine.session.length(0) == len(prompt)


def test_chunks_leave_no_lone_token() -> None:
    for total in range(1, 60):
        for most in range(1, 20):
            left, sizes = total, []
            while left:
                sizes.append(chunk_size(left, most))
                left -= sizes[-1]
            assert sum(sizes) == total
            assert max(sizes) <= max(most, 3)
            assert 1 not in sizes or total == 1


def test_a_session_that_takes_images_whole_gets_them_so(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "c")
    session = OneSlot(ScriptedSession([5, 6, 2]))
    tokenizer = load_tokenizer(tmp_path / "c" / "llm")
    model = ModelInfo.from_config(load_config(tmp_path / "c"), tokenizer)
    chat = Conversation(session, tokenizer, model, 300)
    answer = chat.ask("What?", [Image.new("RGB", (9, 9))], SamplingParams(3))
    assert answer.tokens == [5, 6, 2]
    assert session.sequence.encoded == 1  # type: ignore[attr-defined]
