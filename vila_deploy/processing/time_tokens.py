"""Turn the tokens in which a model tells points in time of a video into seconds."""

from __future__ import annotations

import re

from vila_deploy.checkpoint.video_config import VideoConfig


def with_seconds(text: str, video: VideoConfig, duration_s: float) -> str:
    """Return an answer about a video with seconds in place of time tokens: "<t50>" as "<4.04>".

    Source: `decode_time_token` in llava/cli/infer.py of NVlabs/VILA. Tokens beyond the model's
    last stand for the end of the video.

    Args:
        duration_s: of the video; 0, or a model without such tokens, leaves the text as it is.
    """
    if video.time_tokens < 2 or duration_s <= 0:
        return text
    last = video.time_tokens - 1
    before, after = map(re.escape, video.time_token.split("{t}"))

    def seconds(match: re.Match[str]) -> str:
        return f"<{round(min(int(match[1]), last) * duration_s / last, 2)}>"

    return re.sub(rf"{before}(0|[1-9]\d{{0,8}}){after}", seconds, text)
