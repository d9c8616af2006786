"""Time tokens in an answer become seconds, as the original's command prints them."""

from __future__ import annotations

import pytest

from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.processing.time_tokens import with_seconds

# `decode_time_token` of llava/cli/infer.py of NVlabs/VILA (b760c34) gave these.
CASES = {
    "From <t0> to <t50>.": "From <0.0> to <6.06>.",
    "<t99><t100><t1234>": "<12.0><12.0><12.0>",
    "<t7> <t07> <T7> t7 <t>": "<0.85> <t07> <T7> t7 <t>",
    "": "",
}


@pytest.mark.parametrize("text", CASES)
def test_tokens_become_seconds(text: str) -> None:
    video = VideoConfig(256, time_tokens=100)
    assert with_seconds(text, video, 12.0) == CASES[text]
    assert with_seconds(text, video, 0.0) == text
    assert with_seconds(text, VideoConfig(256), 12.0) == text


def test_another_format() -> None:
    video = VideoConfig(8, time_tokens=11, time_token="[{t}]")
    assert with_seconds("at [5], <t5>", video, 20.0) == "at <10.0>, <t5>"
