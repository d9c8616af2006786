"""Read how a video becomes embeddings from the root config."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vila_deploy.utils.errors import short
from vila_deploy.utils.fields import Fields

MAX_VIDEO_FRAMES = 8192
MAX_TIME_TOKENS = 10_000
MAX_POOLS, MAX_POOL = 8, 4096
IMAGE_ENCODER, VIDEO_ENCODER, TSP_ENCODER = (
    "BasicImageEncoder",
    "BasicVideoEncoder",
    "TSPVideoEncoder",
)
Pool = tuple[int, int, int]


@dataclass(frozen=True)
class VideoConfig:
    """Which frames of a video are taken, and how their features are pooled.

    Args:
        num_frames: frames of a video.
        fps: frames for each second, at most `num_frames`; 0: `num_frames` at even distances.
        pools: TSP's windows of (frames, rows, columns) of the projector's tokens. Each makes a
            sequence of frames of its own, which follow each other in the prompt; none: every frame
            is an image.
        time_tokens: how many tokens of the vocabulary, from the start to the end of the video,
            stand for points in time; 0: none.
        time_token: their text, with {t} for the number.
    """

    num_frames: int = 8
    fps: float = 0.0
    pools: tuple[Pool, ...] = ()
    time_tokens: int = 0
    time_token: str = "<t{t}>"

    def markers(self, frames: int) -> int:
        """Return how many image markers stand for a video of so many frames in the prompt."""
        return sum(frames // pool[0] for pool in self.pools) if self.pools else frames

    def marker_tokens(self, frames: int, tokens: int) -> list[int]:
        """Return the embeddings at each of these markers, `tokens` being those of a frame."""
        if not self.pools:
            return [tokens] * frames
        return [
            tokens // (rows * columns)
            for time, rows, columns in self.pools
            for _ in range(frames // time)
        ]

    @property
    def frame_multiple(self) -> int:
        """Frames are taken in multiples of this number, so that windows are full."""
        return math.lcm(*(pool[0] for pool in self.pools))

    def to_json(self) -> dict[str, Any]:
        """Return what `from_fields` reads."""
        return {**vars(self), "pools": [list(pool) for pool in self.pools]}

    @classmethod
    def from_fields(cls, fields: Fields) -> VideoConfig:
        """Return what `to_json` wrote; a wrong type names its key."""
        return cls(
            num_frames=fields.integer("num_frames", high=MAX_VIDEO_FRAMES),
            fps=fields.number("fps"),
            pools=_pools(fields, "pools", fields.values.get("pools")),
            time_tokens=fields.integer("time_tokens", low=0, high=MAX_TIME_TOKENS),
            time_token=fields.text("time_token"),
        )


def load_video_config(root: Fields, side: int) -> VideoConfig:
    """Read the keys about videos of the root config.

    Args:
        side: rows and columns of the projector's tokens of a frame.

    Raises:
        VilaDeployError: an encoder that is not computed here, or windows that don't fit.
    """
    _encoder(root, "image_encoder", (IMAGE_ENCODER,))
    kind, encoder = _encoder(root, "video_encoder", (VIDEO_ENCODER, TSP_ENCODER))
    pools: tuple[Pool, ...] = ()
    frames = root.integer("num_video_frames", 8, high=MAX_VIDEO_FRAMES)
    if kind == TSP_ENCODER and encoder is not None:
        pools = _pools(encoder, "pool_sizes", encoder.values.get("pool_sizes"))
        if not pools:
            raise encoder.error("pool_sizes", "is missing", "add it, such as [[8, 1, 1]]")
        for time, rows, columns in pools:
            if frames % time or side % rows or side % columns:
                raise encoder.error(
                    "pool_sizes",
                    f"{[time, rows, columns]} does not divide {frames} frames of {side} by {side} "
                    "tokens",
                )
    return VideoConfig(
        num_frames=frames,
        fps=root.number("fps", 0.0, high=1000.0),
        pools=pools,
        time_tokens=root.integer("num_time_tokens", 0, low=0, high=MAX_TIME_TOKENS),
        time_token=_time_token(root),
    )


def _time_token(root: Fields) -> str:
    text = root.text("time_token_format", "<t{t}>")
    if text.count("{t}") != 1 or text.count("{") != 1 or text.count("}") != 1:
        raise root.error("time_token_format", f"must hold one {{t}}, found {short(text)}")
    return text


def _pools(fields: Fields, key: str, value: Any) -> tuple[Pool, ...]:
    """Return windows of three sizes each, as JSON writes them."""
    items = [] if value is None else value
    if not isinstance(items, Sequence) or len(items) > MAX_POOLS or not all(map(_is_pool, items)):
        raise fields.error(
            key, f"must hold 1 to {MAX_POOLS} windows such as [8, 1, 1], found {short(value)}"
        )
    return tuple((time, rows, columns) for time, rows, columns in items)


def _is_pool(item: Any) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 3
        and all(type(size) is int and 1 <= size <= MAX_POOL for size in item)
    )


def _encoder(root: Fields, key: str, known: Sequence[str]) -> tuple[str, Fields | None]:
    """Return class and options of the encoder under `key`; known[0] where there is none.

    VILA's own code writes the object or its JSON text.
    """
    if key not in root:
        return known[0], None
    value = root.values[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise root.error(key, "is no JSON object") from error
    encoder = Fields({key: value}, root.source, root.prefix).child(key)
    target = encoder.text("_target_", known[0])
    name = target.rpartition(".")[2]
    if name not in known:
        raise root.error(key, f"{short(target)} is not supported", f"use {' or '.join(known)}")
    # Tokens around the features of an image or a frame, other than the line end behind each.
    for option, default in (("start_tokens", None), ("end_tokens", "\n"), ("sep_tokens", None)):
        found = encoder.values.get(option, default)
        if found != default:
            raise encoder.error(option, f"{short(found)} is not supported", "remove this key")
    return name, encoder
