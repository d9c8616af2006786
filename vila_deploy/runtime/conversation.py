"""A conversation about images with a running engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import Session
from vila_deploy.processing.images import Pixels, place_features, read_image
from vila_deploy.processing.placeholders import Media, check_no_placeholders
from vila_deploy.processing.time_tokens import with_seconds
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.processing.video import VideoFrames
from vila_deploy.runtime.continuous_batching import ContinuousBatcher
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prompt import (
    Question,
    assemble_prompt,
    check_prompt_length,
    check_utf8,
    prepare_question,
    without_markers,
)
from vila_deploy.runtime.request import (
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    TextPiece,
)
from vila_deploy.utils.arrays import Floats

ImageSource = str | Path | Image.Image
MediaSource = ImageSource | Sequence[ImageSource]  # an image, or the frames of a video


class ImageEncoder(Protocol):
    """The part of a session that turns pixels into features."""

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Do what `Session.encode_images` does."""
        ...


@dataclass(frozen=True)
class Answer:
    """One answer; `tokens` include the stop token, `timings_ms` adds up to the whole wait.

    `finish_reason`: "stop" (the model ended, or a stop string came), "length" (max_new_tokens),
    "context" (cache full), "cancelled". `cached_tokens` of the prompt were not prefilled again.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    timings_ms: dict[str, float]
    cached_tokens: int = 0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first one per second of decoding; 0 if there was none."""
        decode_ms = self.timings_ms["decode"]
        return (len(self.tokens) - 1) / decode_ms * 1e3 if decode_ms else 0.0


def encode_images(session: ImageEncoder, pixels: Sequence[Pixels]) -> list[Floats]:
    """Return features [tokens, hidden] for each place that the images take in the prompt."""
    encoded = ((session.encode_images(image.tiles, image.grid), image) for image in pixels)
    return [features for tiles, image in encoded for features in place_features(list(tiles), image)]


@dataclass
class Conversation:
    """Ask questions about images, one after the other; earlier turns stay in the prompt.

    `OpenedEngine.chat` makes one. Several conversations may take turns on one session: what its
    slots still hold of a prompt is not prefilled again.

    VILA answers one question at a time, and cuts an image into dynamic tiles where it is the only
    one. Here that is the first image of a conversation, if it comes alone.

    Args:
        max_input_len: the longest prompt that the session takes, in tokens.
        system: replaces the model's own system message.
        images: features of images, for conversations on one session to share.
    """

    session: Session
    tokenizer: Tokenizer
    model: ModelInfo
    max_input_len: int
    system: str | None = None
    images: ImageCache = field(default_factory=ImageCache)
    _answered: list[tuple[Question, str]] = field(default_factory=list)
    _video_s: float = 0.0

    def __post_init__(self) -> None:
        if self.system is not None:
            check_utf8(self.system)
            check_no_placeholders(self.system)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Return the questions, with markers where images stand, and their answers."""
        return [(question.text, without_markers(answer)) for question, answer in self._answered]

    def ask(
        self,
        question: str,
        images: Sequence[MediaSource] = (),
        sampling: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
        stop: Sequence[str] = (),
        cancelled: Callable[[], bool] | None = None,
    ) -> Answer:
        """Return the answer to `question` and remember the turn.

        Args:
            images: new images of this turn, paths or PIL images, and videos, lists of frames as
                `sample_frames` returns. <image> in `question` takes the next image, <video> the
                next video; without them all come first.
            sampling: greedy, at most 512 tokens, if left out.
            on_text: called with each piece of text as it comes.
            stop: strings that end the answer; they are no part of it.
            cancelled: asked between steps; True ends the answer, which is remembered as far as it
                came.

        Raises:
            VilaDeployError: an image that can't be read, markers and images that differ in number,
                or a prompt that is too long.
        """
        clock = time.perf_counter()
        media = _read_media(images)
        first = not any(earlier.images for earlier, _ in self._answered)
        asked = prepare_question((*media, question), self.model, first)
        prompt = assemble_prompt(self._answered, asked, self.model, self.tokenizer, self.system)
        # reset() here, /reset in vila-chat.
        anew = "begin anew with /reset, " if self._answered else ""
        check_prompt_length(len(prompt), min(self.max_input_len, self.session.max_seq_len), anew)
        preprocess_ms = (time.perf_counter() - clock) * 1e3
        request = GenerationRequest(prompt, sampling or SamplingParams(), tuple(stop))
        videos = [item for item in _listed(images) if isinstance(item, VideoFrames)]
        self._video_s = videos[-1].duration_s if videos else self._video_s
        show = partial(self._show, on_text or _ignore)
        finished = self._generate(request, show, cancelled or _never)
        self._answered.append((asked, finished.text))
        timings = finished.timings_ms
        timings["prefill"] += timings.pop("queue")
        return Answer(
            text=with_seconds(finished.text, self.model.video, self._video_s),
            tokens=list(finished.tokens),
            prompt_tokens=len(prompt),
            finish_reason=finished.finish_reason,
            timings_ms={"preprocess": preprocess_ms, **timings},
            cached_tokens=finished.cached_tokens,
        )

    def reset(self) -> None:
        """Forget all turns and images."""
        self._answered, self._video_s = [], 0.0

    def _show(self, show: Callable[[str], None], piece: str) -> None:
        # A time token is one token, so that no piece holds half of it.
        show(with_seconds(piece, self.model.video, self._video_s))

    def _generate(
        self, request: GenerationRequest, show: Callable[[str], None], cancelled: Callable[[], bool]
    ) -> Finished:
        """Run the engine until the answer is complete."""
        events: deque[Event] = deque()
        batcher = ContinuousBatcher(
            self.session, self.tokenizer, self.model.stop_token_ids, self.images
        )
        ticket = batcher.submit(request, events.append)
        try:
            while True:
                if cancelled():
                    ticket.cancel()
                batcher.step()
                while events:
                    event = events.popleft()
                    if isinstance(event, TextPiece):
                        show(event.text)
                    elif isinstance(event, Failed):
                        raise event.error.__cause__ or event.error
                    else:
                        return event
        finally:
            # Also of an answer that was interrupted, whose slot others need.
            batcher.abort()


def _read_media(media: Sequence[MediaSource] | ImageSource) -> list[Media]:
    """Return RGB images and frames of one source or of several."""
    return [
        read_image(item)
        if isinstance(item, str | Path | Image.Image) or not isinstance(item, Sequence)
        else [read_image(frame) for frame in item]
        for item in _listed(media)
    ]


def _listed(media: Sequence[MediaSource] | ImageSource) -> Sequence[MediaSource]:
    return [media] if isinstance(media, str | Path | Image.Image) else media


def _ignore(text: str) -> None:
    pass


def _never() -> bool:
    return False
