"""Turn the messages of a request into a prompt: fetch and decode its images, then render it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.runtime.prompt import Message, Prompt, prepare_prompt, prepare_text
from vila_deploy.server.errors import ApiError, refused
from vila_deploy.server.images import data_uri_bytes, decode_image
from vila_deploy.server.openai_schema import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    Part,
    VideoPart,
)
from vila_deploy.server.options import RequestLimits
from vila_deploy.server.remote_images import Network, fetch_image
from vila_deploy.utils.errors import VilaDeployError

# Decoded images take memory; more threads would only make each slower.
DECODER_THREADS = 2
LONGEST_SPECIAL_TOKEN = 64  # in bytes; those are spelt in texts too
Result = TypeVar("Result")
REMOTE = ("http://", "https://")
ALLOW_FETCHING = "send a data: URI, or start the server with --allow-image-urls"


@dataclass
class PromptMaker:
    """Makes prompts for one model, in threads of its own.

    Args:
        max_tokens: the longest prompt that the engine takes.
        network: None where no image is fetched.
    """

    model: ModelInfo
    tokenizer: Tokenizer
    limits: RequestLimits
    max_tokens: int
    network: Network | None = None
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(DECODER_THREADS, "images")
    )

    def __post_init__(self) -> None:
        spelt = (self.tokenizer.token_bytes(n) for n in range(self.tokenizer.vocab_size))
        longest = max(len(token) for token in spelt if token is not None)
        self._max_text_bytes = self.max_tokens * max(longest, LONGEST_SPECIAL_TOKEN)

    async def chat(self, request: ChatRequest) -> Prompt:
        """Return the prompt of a conversation.

        Raises:
            ApiError: an image that can't be had, too many, or messages that no template has.
        """
        check_image_count(request.images, self.limits)
        contents = [await self._content(image) for image in request.images]
        return await self.in_thread(self._chat, request, contents)

    def render(self, request: ChatRequest) -> Prompt:
        """Return the prompt of a conversation whose images are all in the request itself.

        Raises:
            ApiError: as `chat`.
        """
        check_image_count(request.images, self.limits)
        for image in request.images:
            if is_address(image):
                raise no_fetching(image, "send a data: URI")
        return self._chat(request, [None] * len(request.images))

    async def completion(self, request: CompletionRequest) -> Prompt:
        """Return the prompt of bare text."""
        return await self.in_thread(self._completion, request)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, work: Callable[..., Result], *args: object) -> Result:
        """Return what `work(*args)` returns, without keeping the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def _content(self, image: ImagePart) -> bytes | None:
        """Return the bytes of an image that has to be fetched; None for a data: URI."""
        if not is_address(image):
            return None
        if self.network is None:
            raise no_fetching(image)
        return await fetch_image(image.url, image.param, self.limits.body_bytes, self.network)

    def _chat(self, request: ChatRequest, contents: Sequence[bytes | None]) -> Prompt:
        texts = [
            part for message in request.messages for part in message.parts if isinstance(part, str)
        ]
        self._check_size(texts, "messages")
        images = iter(self._decode(request.images, contents))

        def filled(part: Part) -> str | Image.Image | list[Image.Image]:
            if isinstance(part, str):
                return part
            if isinstance(part, VideoPart):
                return [next(images) for _ in part.frames]
            return next(images)

        messages = [
            Message(message.role, tuple(filled(part) for part in message.parts))
            for message in request.messages
        ]
        try:
            return prepare_prompt(messages, self.model, self.tokenizer, placeholders="refuse")
        except VilaDeployError as error:
            raise refused(error, "messages") from None

    def _decode(
        self, images: Sequence[ImagePart], contents: Sequence[bytes | None]
    ) -> list[Image.Image]:
        decoded, pixels_left = [], 2 * self.limits.image_pixels
        for image, content in zip(images, contents, strict=True):
            if content is None:
                content = data_uri_bytes(image.url, image.param)
            most = min(self.limits.image_pixels, pixels_left)
            decoded.append(decode_image(content, image.param, most))
            pixels_left -= decoded[-1].width * decoded[-1].height
        return decoded

    def _check_size(self, texts: Sequence[str], param: str) -> None:
        """Refuse texts that can't fit, which would take long to tokenize."""
        size = sum(len(text.encode()) for text in texts)
        if size > self._max_text_bytes:
            raise ApiError(
                f"the text has {size} bytes, {self.max_tokens} tokens hold at most "
                f"{self._max_text_bytes}",
                param=param,
                code="context_length_exceeded",
                fix="send less text",
            )

    def _completion(self, request: CompletionRequest) -> Prompt:
        self._check_size([request.prompt], "prompt")
        try:
            return prepare_text(request.prompt, self.tokenizer)
        except VilaDeployError as error:
            raise refused(error, "prompt") from None


def check_image_count(images: Sequence[ImagePart], limits: RequestLimits) -> None:
    """Raise ApiError where a request has more images and frames than are allowed."""
    if len(images) > limits.images:
        raise ApiError(
            f"has {len(images)} images and frames, at most {limits.images} are allowed",
            param="messages",
            code="too_many_images",
        )


def is_address(image: ImagePart) -> bool:
    """Return whether an image has to be fetched."""
    return image.url[:8].lower().startswith(REMOTE)


def no_fetching(image: ImagePart, fix: str = ALLOW_FETCHING) -> ApiError:
    """Return what a server answers to an image that it may not fetch."""
    return ApiError("is an address, and this server fetches no images", param=image.param, fix=fix)
