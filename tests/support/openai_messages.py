"""Conversations as OpenAI's API takes them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from vila_deploy.runtime.prompt import Message


def as_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as JSON: images as data: URIs, videos as lists of frames."""
    return [
        {"role": message.role, "content": [_part(part) for part in message.content]}
        for message in messages
    ]


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image.Image):
        url = f"data:image/png;base64,{_base64(part)}"
        return {"type": "image_url", "image_url": {"url": url}}
    frames = ",".join(map(_base64, part))
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}


def _base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
