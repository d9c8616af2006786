"""TSP, VILA's encoder of videos, against the original's: embeddings and logits of whole prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import vision_cases as cases
from tests.support.original_checkpoint import write_checkpoint
from tests.support.paths import GOLDEN
from tests.support.vision_cases import assert_sample
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.frame_windows import FrameWindow, frame_windows, window_mean
from vila_deploy.processing.images import Pixels
from vila_deploy.processing.multimodal_prompt import merge_embeddings
from vila_deploy.runtime.conversation import encode_images
from vila_deploy.utils.errors import VilaDeployError

CASES = json.loads((GOLDEN / "tsp.json").read_text("utf-8"))["cases"]


def tsp(pools: list[list[int]], frames: int) -> dict[str, Any]:
    target = "llava.model.encoders.TSPVideoEncoder"
    encoder = {"_target_": target, "pool_sizes": pools}
    return {"video_encoder": encoder, "num_video_frames": frames}


@pytest.mark.parametrize("name", CASES)
def test_a_video_equals_the_original(name: str, tmp_path: Path) -> None:
    expected = CASES[name]
    shape, seed = expected["pixels"]
    root = write_checkpoint(tmp_path / "c", qwen2=True, **tsp(expected["pools"], shape[0]))
    checkpoint = open_checkpoint(root)
    session, video = ReferenceSession(checkpoint), checkpoint.config.video
    frames = [Image.new("RGB", (1, 1)) for _ in range(shape[0])]
    numbers = {id(frame): number for number, frame in enumerate(frames)}
    values, pixels = cases.pixels(tuple(shape), seed), []
    for window in frame_windows(frames, video):
        assert isinstance(window, FrameWindow)
        pixels.append(Pixels(values[[numbers[id(f)] for f in window.frames]], pool=window.pool))
    features = encode_images(session, pixels)
    side = checkpoint.config.tokens_per_block
    assert [len(place) for place in features] == video.marker_tokens(shape[0], side)
    first, last = expected["input_ids"][:2], expected["input_ids"][3:]
    end = [cases.NVILA_NEWLINE]
    chunks = [first, *[end] * (len(features) - 1), end + last]
    embeds = merge_embeddings(chunks, features, session.embed_tokens)
    assert len(embeds) == expected["length"]
    assert_sample(embeds, expected["embeds"])
    assert_sample(session.llm(torch.from_numpy(embeds)).numpy(), expected["logits"])


@pytest.mark.parametrize("pool", [(8, 1, 1), (2, 3, 1), (1, 1, 6), (4, 2, 3), (1, 1, 1)])
def test_means_are_those_of_plain_loops(pool: tuple[int, int, int]) -> None:
    features = np.random.default_rng(3).normal(size=(16, 36, 5)).astype(np.float32)
    time, rows, columns = pool
    grid = features.reshape(16, 6, 6, 5)
    expected = [
        [
            grid[t : t + time, r : r + rows, c : c + columns].reshape(-1, 5).mean(0)
            for r in range(0, 6, rows)
            for c in range(0, 6, columns)
        ]
        for t in range(0, 16, time)
    ]
    np.testing.assert_allclose(window_mean(features, pool), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "near"), [(1, 8), (7, 8), (9, 8), (23, 16)])
def test_frames_that_fill_no_window_are_refused(count: int, near: int) -> None:
    frames = [Image.new("RGB", (2, 2))] * count
    with pytest.raises(VilaDeployError, match=f"{count} frames: .* multiple of 8.*take {near} "):
        frame_windows(frames, VideoConfig(8, pools=((8, 1, 1),)))
    assert list(frame_windows(frames, VideoConfig(8))) == frames
