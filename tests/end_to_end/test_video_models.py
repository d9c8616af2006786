"""Models of videos, tiny: quantized, built and asked about a video; answers are the reference's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.commands import assert_one_line, invoke, succeed
from tests.support.comparison import greedy_tokens_of_both
from tests.support.tiny import make_checkpoint
from tests.support.videos import make_video
from vila_deploy.checkpoint.config import load_config
from vila_deploy.processing.video import sample_video

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TSP = {
    "video_encoder": {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}
}
QWEN2: dict[str, Any] = {"qwen2": True, "kv_heads": 2, "added_tokens": CHATML}
# As NVILA-8B-Video, NVILA-Lite-15B-Video, the LongVILA of a million tokens, Heron-NVILA-Lite.
MODELS: dict[str, dict[str, Any]] = {
    "TSP": {
        **QWEN2, "projector": "mlp_downsample_2x2_fix", "added_tokens": (*CHATML, "<t0>", "<t1>"),
        "root_config": {**TSP, "num_video_frames": 16, "num_time_tokens": 2},
    },
    "TSP, dynamic tiles": {
        **QWEN2, "projector": "mlp_downsample_3x3_fix",
        "root_config": {**TSP, "image_aspect_ratio": "dynamic", "num_video_frames": 16},
    },
    "linear rope": {
        **QWEN2, "root_config": {"num_video_frames": 12, "fps": 0.0},
        "llm_config": {"rope_scaling": {"factor": 4.0, "type": "linear"}},
    },
    "Lite, 2 by 2": {
        **QWEN2, "projector": "mlp_downsample_2x2_fix",
        "root_config": {"image_aspect_ratio": "dynamic", "max_tiles": 4, "num_video_frames": 4},
    },
}  # fmt: skip


def blocks(index: int) -> np.ndarray:
    """Colours in 3 × 4 blocks, others for each frame."""
    colours = np.random.default_rng(index).integers(0, 2, (3, 4, 3), np.uint8) * 255
    return colours.repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize("name", MODELS)
def test_from_checkpoint_to_answer(name: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", **MODELS[name])
    quantized, engine = tmp_path / "q", tmp_path / "e"
    succeed("vila-quantize", root, "-o", quantized, "--algorithm", "rtn", "--no-eval",
            "--group-size", 64)  # fmt: skip
    # Comparisons with the reference take two int8 terms.
    succeed("vila-build-engine", quantized, "--target", "cpu", "-o", engine, "--activations",
            "int8x2", "--vision", "fp16", "--lm-head", "fp16")  # fmt: skip
    video = make_video(tmp_path / "v", 40, image=blocks)
    answer = json.loads(
        succeed("vila-chat", engine, "--video", video, "-p", "What happens?", "--json",
                "--max-new-tokens", 4)
    )  # fmt: skip
    config = load_config(quantized)
    assert config.video == load_config(root).video
    # All but the text, which is short beside it.
    assert config.tokens_per_video < answer["prompt_tokens"] < config.tokens_per_video + 100
    frames: Any = sample_video(video, config.video, config.image, config.tiling)
    for expected, found in greedy_tokens_of_both(
        quantized, engine, [([frames], "What happens?"), ([frames[0]], "What is it?")]
    ):
        assert found == expected


def test_frames_that_fill_no_window_are_one_line(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", layers=1, **MODELS["TSP"])
    engine, video = tmp_path / "e", make_video(tmp_path / "v", 40, image=blocks)
    succeed("vila-build-engine", root, "--target", "cpu", "-o", engine)
    asked = ("--video", video, "-p", "What happens?", "--max-new-tokens", 1)
    line = assert_one_line(invoke("vila-chat", engine, *asked, "--video-frames", 12))
    assert "12 frames: this model takes a multiple of 8" in line
    assert invoke("vila-chat", engine, *asked, "--video-frames", 8).returncode == 0


def test_a_plan_says_what_a_video_takes(tmp_path: Path) -> None:
    changes = {**MODELS["linear rope"]["root_config"], "num_video_frames": 256}
    root = make_checkpoint(tmp_path / "c", **{**MODELS["linear rope"], "root_config": changes})
    for command in ("vila-build-engine", "vila-quantize"):
        flags = ["--plan", *(["--target", "cpu"] if command == "vila-build-engine" else [])]
        text = succeed(command, root, *flags)
        assert "a video: 256 frames, about 1,280 tokens; the engine takes 512" in text
        assert "vila-chat --video-frames" in text
