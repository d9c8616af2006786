"""Where vila-chat reads from and writes to: files, stdin, stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.images import read_image, read_image_bytes
from vila_deploy.processing.video import VideoFrames, sample_video
from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from PIL import Image

STDIN_BYTES = 1 << 30


def check_output() -> None:
    """Raise VilaDeployError if there is nowhere to write answers to."""
    if sys.stdout is None:
        raise VilaDeployError("stdout is closed", fix="send the answer to a file or /dev/null")


def read_question() -> str:
    """Return all of stdin as one question.

    Raises:
        VilaDeployError: it is closed or empty; text that is no UTF-8 gets its error later.
    """
    text = _stdin("question", "-p QUESTION").decode("utf-8", "surrogateescape").strip()
    if not text:
        raise VilaDeployError("no question came through stdin", fix="give one with -p QUESTION")
    return text


def read_media_image(path: str | Path) -> Image.Image:
    """Return the image in a file, or on stdin for "-", as `read_image` does."""
    if path != "-":
        return read_image(path)
    return read_image_bytes(_stdin("image", "--image FILE"), "stdin")


def video_reader(model: ModelInfo, frames: int | None) -> Callable[[Path], VideoFrames]:
    """Return what reads a video as `model` takes it; `frames`: None for the model's own number."""
    return partial(
        sample_video, video=model.video, image=model.image, tiling=model.tiling, count=frames
    )


def _stdin(what: str, instead: str) -> bytes:
    if sys.stdin is None:
        raise VilaDeployError(f"no {what}: stdin is closed", fix=f"give one with {instead}")
    content = sys.stdin.buffer.read(STDIN_BYTES + 1)
    if len(content) > STDIN_BYTES:
        raise VilaDeployError(
            f"the {what} on stdin is larger than {STDIN_BYTES >> 20} MiB",
            fix=f"give it with {instead}",
        )
    return content
