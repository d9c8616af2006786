"""Small videos whose frames tell their own number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import av
import numpy as np
from PIL import Image

STEP = 2
"""Grey levels from one frame to the next."""

# Name: (ending of the file, codec, pixel format, options of the container).
KINDS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "mp4": ("mp4", "libx264", "yuv420p", {}),
    "mp4, index first": ("mp4", "libx264", "yuv420p", {"movflags": "faststart"}),
    "mp4, fragments": ("mp4", "libx264", "yuv420p", {"movflags": "frag_keyframe+empty_moov"}),
    "mkv": ("mkv", "ffv1", "bgr0", {}),
    "webm": ("webm", "libvpx-vp9", "yuv420p", {}),
    "avi": ("avi", "ffv1", "bgr0", {}),
    "ts": ("ts", "libx264", "yuv420p", {}),
    "mpeg": ("mpg", "mpeg2video", "yuv420p", {}),
    "flv": ("flv", "libx264", "yuv420p", {}),
    "gif": ("gif", "gif", "gray", {}),
}


def grey(index: int, width: int = 32, height: int = 16) -> np.ndarray:
    """Frame `index` [height, width, 3]: uint8, all of brightness STEP * index."""
    return np.full((height, width, 3), STEP * index, np.uint8)


def make_video(
    path: Path,
    frames: int,
    kind: str = "mkv",
    image: Callable[[int], np.ndarray] = grey,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Writes image(0) .. image(frames - 1) and returns `path` with the ending of its kind."""
    ending, codec, pixel_format, container_options = KINDS[kind]
    path = path.with_suffix(f".{ending}")
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options=dict(options or {}))
        stream.height, stream.width = image(0).shape[:2]
        stream.pix_fmt = pixel_format
        stream.thread_count = 1
        for index in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image(index), "rgb24")))
        container.mux(stream.encode())
    return path


def numbers(images: list[Image.Image]) -> list[int]:
    """Which frames of a made video these are."""
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]
