"""Keys of the root config about videos: read, counted, or refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.damage import refused
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.utils.fields import Fields

TSP = "llava.model.encoders.TSPVideoEncoder"


def tsp(*pools: Any, **options: Any) -> dict[str, Any]:
    return {"video_encoder": {"_target_": TSP, "pool_sizes": list(pools), **options}}


def checkpoint(folder: Path, root_config: dict[str, Any]) -> Path:
    """A frame is 4 tokens: 2 by 2 windows of 3 by 3 patches."""
    return make_checkpoint(folder / "c", qwen2=True, root_config=root_config)


@pytest.mark.parametrize("as_text", [False, True])
def test_tsp_is_read(as_text: bool, tmp_path: Path) -> None:
    """The object, or its JSON text, as `save_pretrained` of VILA's own code leaves it."""
    encoder: Any = tsp([8, 1, 1])["video_encoder"]
    values = {
        "video_encoder": json.dumps(encoder) if as_text else encoder,
        "num_video_frames": 256, "num_time_tokens": 100, "time_token_format": "<t{t}>", "fps": 0.0,
    }  # fmt: skip
    video = load_config(checkpoint(tmp_path, values)).video
    assert video == VideoConfig(256, 0.0, ((8, 1, 1),), 100, "<t{t}>")
    assert video.markers(256) == 32
    assert video.marker_tokens(256, 256) == [256] * 32
    assert video.frame_multiple == 8


def test_several_windows_follow_each_other() -> None:
    video = VideoConfig(16, pools=((8, 1, 1), (2, 2, 2)))
    assert video.marker_tokens(16, 64) == [64] * 2 + [16] * 8
    assert video.markers(16) == 10
    assert video.frame_multiple == 8
    assert VideoConfig(16).marker_tokens(3, 64) == [64] * 3


def test_a_basic_encoder_pools_nothing(tmp_path: Path) -> None:
    basic = {"video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"}}
    assert load_config(checkpoint(tmp_path, basic)).video == VideoConfig()


def test_it_goes_through_json() -> None:
    video = VideoConfig(64, 2.0, ((8, 1, 1), (1, 2, 2)), 100, "[{t}]")
    values = json.loads(json.dumps(video.to_json()))
    assert VideoConfig.from_fields(Fields(values, Path("manifest.json"))) == video


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another encoder": (
        {"video_encoder": {"_target_": "somewhere.Mine"}},
        r"video_encoder: 'somewhere.Mine' is not supported; use BasicVideoEncoder or TSPVideoEnc",
    ),
    "image encoder": (
        {"image_encoder": {"_target_": TSP}}, r"image_encoder: .*not supported; use BasicImageEnc",
    ),
    "no JSON": ({"image_encoder": "{oops"}, r"image_encoder: is no JSON object"),
    "a number": ({"image_encoder": "3"}, r"image_encoder: must be an object"),
    "deep": ({"image_encoder": "[" * 10**5}, r"image_encoder: is no JSON object"),
    "no windows": ({"video_encoder": {"_target_": TSP}}, r"video_encoder.pool_sizes: is missing"),
    "empty windows": (tsp(), r"video_encoder.pool_sizes: is missing"),
    "a flat window": (tsp(8, 1, 1), r"pool_sizes: must hold 1 to 8 windows such as \[8, 1, 1\]"),
    "two sizes": (tsp([8, 1]), r"pool_sizes: must hold"),
    "zero": (tsp([0, 1, 1]), r"pool_sizes: must hold"),
    "true": (tsp([True, 1, 1]), r"pool_sizes: must hold"),
    "many": (tsp(*[[8, 1, 1]] * 9), r"pool_sizes: must hold"),
    "frames left over": (
        {**tsp([8, 1, 1]), "num_video_frames": 12},
        r"pool_sizes: \[8, 1, 1\] does not divide 12 frames of 2 by 2 tokens",
    ),
    "tokens left over": (tsp([8, 3, 3]), r"pool_sizes: \[8, 3, 3\] does not divide 8 frames of 2"),
    "start": (tsp([8, 1, 1], start_tokens="<v>"), r"start_tokens: '<v>' is not supported"),
    "end": (tsp([8, 1, 1], end_tokens=None), r"end_tokens: None is not supported"),
    "separator": (tsp([8, 1, 1], sep_tokens="\n"), r"sep_tokens: .* is not supported"),
    "negative": ({"fps": -1.0}, r"fps: must be a number"),
    "time tokens": ({"num_time_tokens": -1}, r"num_time_tokens: must be an integer"),
    "time token": ({"time_token_format": "<t>"}, r"time_token_format: must hold one \{t\}"),
    "code": ({"time_token_format": "{t.__class__}{t}"}, r"time_token_format: must hold one"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    line = refused(checkpoint(tmp_path, changes))
    assert re.search(message, line), line
    assert "\n" not in line
