"""Where the frames of a video, and windows of them, stand in a prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.prompt import prepare_question

FRAMES = [Image.new("RGB", (9, 9), (20 * number, 0, 0)) for number in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    """A model that averages the tokens of 4 frames, and again of all 8."""
    root = make_checkpoint(tmp_path_factory.mktemp("videos") / "c")
    model = ModelInfo.from_config(open_checkpoint(root).config, load_tokenizer(root / "llm"))
    return replace(model, video=VideoConfig(num_frames=8, pools=((4, 1, 1), (8, 1, 1))))


def test_windows_between_texts_stay_there(model: ModelInfo) -> None:
    first = prepare_question((FRAMES, "What happens?"), model)
    between = prepare_question(("Here:", FRAMES, "What happens?"), model)
    assert first.text.startswith(IMAGE_MARKER)
    assert between.text.startswith("Here:" + IMAGE_MARKER)
    assert first.text.count(IMAGE_MARKER) == between.text.count(IMAGE_MARKER) == 3
    assert [image.digest for image in first.images] == [image.digest for image in between.images]
