"""Average the tokens of a video's frames over windows, as VILA's TSP encoder does.

Source: `TSPVideoEncoder` in llava/model/encoders/video/tsp.py of NVlabs/VILA, which works on the
projector's output: so every backend's vision encoder runs frame by frame, and only the mean is
left to the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vila_deploy.checkpoint.video_config import Pool, VideoConfig
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError


@dataclass(frozen=True)
class FrameWindow:
    """Frames of a video that share one place in the prompt; pool[0] of them."""

    frames: tuple[Image.Image, ...]
    pool: Pool


# What takes one place in a prompt, before its pixels are made.
Item = Image.Image | FrameWindow


def frame_windows(frames: Sequence[Item], video: VideoConfig) -> Sequence[Item]:
    """Return what takes the places of a video in the prompt: its frames, or windows of them.

    Args:
        frames: of one video; windows stay as they are.

    Raises:
        VilaDeployError: frames that fill no whole windows.
    """
    images = [frame for frame in frames if isinstance(frame, Image.Image)]
    if not video.pools or len(images) < len(frames):
        return frames
    check_frame_count(len(images), video)
    return [
        FrameWindow(tuple(images[start : start + pool[0]]), pool)
        for pool in video.pools
        for start in range(0, len(images), pool[0])
    ]


def check_frame_count(count: int, video: VideoConfig) -> None:
    """Raise VilaDeployError where `count` frames fill no whole windows."""
    multiple = video.frame_multiple
    if count % multiple:
        near = max(count - count % multiple, multiple)
        raise VilaDeployError(
            f"{count} frames: this model takes a multiple of {multiple}, whose tokens it averages",
            fix=f"take {near} frames of the video",
        )


def window_mean(features: Floats, pool: Pool) -> Floats:
    """Return features [windows, tokens, hidden], averaged over windows of a video's frames.

    Args:
        features: [frames, tokens, hidden] of whole windows; the tokens are a square, row by row.
        pool: frames, rows and columns of a window.
    """
    frames, tokens, hidden = features.shape
    side, (time, rows, columns) = math.isqrt(tokens), pool
    grid = features.reshape(
        frames // time, time, side // rows, rows, side // columns, columns, hidden
    )
    return grid.mean((1, 3, 5), dtype=np.float32).reshape(frames // time, -1, hidden)
