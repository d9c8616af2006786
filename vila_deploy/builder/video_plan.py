"""What a video takes of an engine's sequence, for `--plan`."""

from __future__ import annotations

from typing import Any

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.build_request import video_seq_len
from vila_deploy.engine.manifest import Limits


def video_json(config: VilaConfig, limits: Limits) -> dict[str, Any]:
    """Return the model's own frames and tokens of a video, and whether the engine takes them."""
    return {
        "frames": config.video.num_frames,
        "fps": config.video.fps,
        "tokens": config.tokens_per_video,
        "max_seq_len": limits.max_seq_len,
        "fits": config.tokens_per_video < limits.max_input_len,
    }


def video_line(config: VilaConfig, limits: Limits) -> str:
    """Return the same in a line, with what to do where the engine takes fewer."""
    frames, tokens = config.video.num_frames, config.tokens_per_video
    line = f"a video: {frames} frames, about {tokens:,} tokens"
    if tokens < limits.max_input_len:
        return f"{line}; the engine takes {limits.max_seq_len:,}"
    longest = config.llm.max_position_embeddings
    needed = video_seq_len(config)
    advice = f"--max-seq-len {needed} takes it" if needed <= longest else "fewer frames fit"
    return f"{line}; the engine takes {limits.max_seq_len:,}: {advice}, or vila-chat --video-frames"
