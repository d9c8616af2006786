"""Turn the input tensors of a Triton request into a request to our scheduler."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.processing.images import read_image_bytes
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.runtime.prompt import Message, prepare_prompt
from vila_deploy.runtime.request import GenerationRequest
from vila_deploy.utils.errors import VilaDeployError

MAX_IMAGES, MAX_IMAGE_BYTES, MAX_STOPS = 64, 20 << 20, 16
# Input → field of SamplingParams.
SAMPLING = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
}
# Signatures of the files whose bytes may stand in a tensor as they are.
IMAGE_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"GIF8")


@dataclass(frozen=True)
class Answer:
    """A checked request, and whether its answer comes in pieces."""

    request: GenerationRequest
    streams: bool


def parse_request(
    inputs: Mapping[str, NDArray[Any]], model: ModelInfo, tokenizer: Tokenizer
) -> Answer:
    """Return the request that input tensors, by name, ask for.

    Raises:
        VilaDeployError: text that is no UTF-8 or holds a placeholder, an image that can't be read,
            too many of them, or a number out of its range.
    """
    content = tuple(_image(value, index) for index, value in enumerate(_several(inputs, "image")))
    if len(content) > MAX_IMAGES:
        raise VilaDeployError(f"{len(content)} images", fix=f"give at most {MAX_IMAGES}")
    messages = [Message("user", (*content, _text(_one(inputs, "text_input"), "text_input")))]
    if "system" in inputs:
        messages.insert(0, Message("system", (_text(_one(inputs, "system"), "system"),)))
    numbers = {
        field: _one(inputs, name).item() for name, field in SAMPLING.items() if name in inputs
    }
    stops = tuple(_text(value, "stop") for value in _several(inputs, "stop"))
    if len(stops) > MAX_STOPS or "" in stops:
        raise VilaDeployError("stop is empty or too long", fix=f"give at most {MAX_STOPS} strings")
    prompt = prepare_prompt(messages, model, tokenizer, "refuse")
    streams = bool(_one(inputs, "stream")) if "stream" in inputs else True
    return Answer(GenerationRequest(prompt, SamplingParams(**numbers), stops), streams)


def _several(inputs: Mapping[str, NDArray[Any]], name: str) -> list[Any]:
    return list(inputs[name].reshape(-1)) if name in inputs else []


def _one(inputs: Mapping[str, NDArray[Any]], name: str) -> Any:
    values = _several(inputs, name)
    if len(values) != 1:
        raise VilaDeployError(f"{name} has {len(values)} values", fix="give one")
    return values[0]


def _text(value: bytes | str, name: str) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise VilaDeployError(f"{name} is no UTF-8", fix="check its encoding") from error


def _image(value: bytes | str, index: int) -> Image.Image:
    """Return the image of a file's bytes, or of those in base64, as JSON needs them."""
    where, content = f"image {index}", value.encode() if isinstance(value, str) else value
    if len(content) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise VilaDeployError(
            "is too large", where=where, fix=f"give at most {MAX_IMAGE_BYTES >> 20} MB"
        )
    if not content.startswith(IMAGE_SIGNATURES):
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise VilaDeployError(
                "is neither an image file nor base64", where=where, fix="encode the file's bytes"
            ) from error
    return read_image_bytes(content, where)
