"""A conversation about images with a running engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import Session
from vila_deploy.processing.chat_template import (
    IMAGE_MARKER,
    PROMPT_TEMPLATES,
    render,
    with_tile_markers,
)
from vila_deploy.processing.images import Pixels, preprocess, read_image
from vila_deploy.processing.multimodal_prompt import merge_embeddings, prompt_length, text_chunks
from vila_deploy.processing.placeholders import Media, bind_placeholders
from vila_deploy.processing.tokenizer import IncrementalDetokenizer, Tokenizer
from vila_deploy.runtime.generate import generate
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

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

    `finish_reason`: "stop" (the model ended), "length" (max_new_tokens), "context" (cache full).
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    timings_ms: dict[str, float]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first one per second of decoding; 0 if there was none."""
        decode_ms = self.timings_ms["decode"]
        return (len(self.tokens) - 1) / decode_ms * 1e3 if decode_ms else 0.0


def place_images(
    question: str, media: Sequence[Media], model: ModelInfo, first: bool = True
) -> tuple[str, list[Pixels]]:
    """Return `question` with a marker for each place that an image takes, and the pixels.

    Args:
        media: images, RGB as `read_image` returns them, and videos as sequences of frames.
        first: whether no earlier turn had an image.

    Raises:
        VilaDeployError: placeholders and images or videos differ in number.
    """
    question, images = bind_placeholders(question, media, model.image_end)
    pixels = preprocess(images, model.image, model.tiling, alone=first)
    if model.tiling.mode == "dynamic" and len(images) == 1 and first:
        question = with_tile_markers(question, len(pixels[0].tiles))
    return question, pixels


def encode_images(session: ImageEncoder, pixels: Sequence[Pixels]) -> list[Floats]:
    """Return features [tokens, hidden] for each place that the images take in the prompt."""
    encoded = (session.encode_images(image.tiles, image.grid) for image in pixels)
    return [features for image in encoded for features in image]


@dataclass
class Conversation:
    """Ask questions about images, one after the other; earlier turns stay in the prompt.

    `OpenedEngine.chat` makes one. It uses slot 0 and prefills all turns at each question, so
    several conversations may take turns on one session.

    VILA answers one question at a time, and cuts an image into dynamic tiles where it is the only
    one. Here that is the first image of a conversation, if it comes alone.

    Args:
        max_input_len: the longest prompt that the session takes, in tokens.
    """

    session: Session
    tokenizer: Tokenizer
    model: ModelInfo
    max_input_len: int
    turns: list[tuple[str, str]] = field(default_factory=list)
    _features: list[Floats] = field(default_factory=list)

    def ask(
        self,
        question: str,
        images: Sequence[MediaSource] = (),
        sampling: SamplingParams | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Return the answer to `question` and remember the turn.

        Args:
            images: new images of this turn, paths or PIL images, and videos, lists of frames as
                `sample_frames` returns. <image> in `question` takes the next image, <video> the
                next video; without them all come first.
            sampling: greedy, at most 512 tokens, if left out.
            on_text: called with each piece of text as it comes.

        Raises:
            VilaDeployError: an image that can't be read, markers and images that differ in number,
                or a prompt that is too long.
        """
        sampling = sampling or SamplingParams()
        show, clock = on_text or _ignore, _Clock()
        _check_text(question)
        media = _read_media(images)
        question, pixels = place_images(question, media, self.model, first=not self._features)
        clock.lap("preprocess")
        prompt = render(PROMPT_TEMPLATES[self.model.prompt], self.turns, question)
        chunks = text_chunks(self.tokenizer, prompt, self.model.image_end)
        new_tokens = [count for image in pixels for count in self.model.image_tokens(image)]
        length = prompt_length(chunks, [*map(len, self._features), *new_tokens])
        self._check_length(length)
        features = [*self._features, *encode_images(self.session, pixels)]
        clock.lap("vision")
        embeds = merge_embeddings(chunks, features, self.session.embed_tokens)

        detokenizer, started = IncrementalDetokenizer(self.tokenizer), False
        tokens: list[int] = []
        for token in generate(self.session, embeds, self.model.stop_token_ids, sampling):
            if not tokens:
                clock.lap("prefill")
            tokens.append(token)
            piece = detokenizer.push(token)
            if not started:
                piece = piece.lstrip()
                started = bool(piece)
            show(piece)
        show(detokenizer.finish())
        clock.lap("decode")
        # Not what was shown: bytes of a broken character came one by one.
        text = self.tokenizer.decode(tokens).strip()
        # An answer may spell a marker; in later prompts it would ask for an image.
        self.turns.append((question, text.replace(IMAGE_MARKER, "")))
        self._features = features
        return Answer(
            text=text,
            tokens=tokens,
            prompt_tokens=length,
            finish_reason=self._finish_reason(tokens, sampling),
            timings_ms=clock.laps_ms,
        )

    def reset(self) -> None:
        """Forget all turns and images."""
        self.turns, self._features = [], []

    def _check_length(self, length: int) -> None:
        limit = min(self.max_input_len, self.session.max_seq_len)
        if length > limit:
            # reset() here, /reset in vila-chat.
            anew = "begin anew with /reset, " if self.turns else ""
            raise VilaDeployError(
                f"the prompt takes {length} tokens, this engine takes {limit}",
                fix=f"{anew}use fewer images, a shorter prompt, or build with a larger "
                "--max-input-len",
            )

    def _finish_reason(self, tokens: list[int], sampling: SamplingParams) -> str:
        if tokens and tokens[-1] in self.model.stop_token_ids:
            return "stop"
        return "length" if len(tokens) == sampling.max_new_tokens else "context"


def _read_media(media: Sequence[MediaSource] | ImageSource) -> list[Media]:
    """Return RGB images and frames of one source or of several."""
    if isinstance(media, str | Path | Image.Image):
        media = [media]
    return [
        read_image(item)
        if isinstance(item, str | Path | Image.Image) or not isinstance(item, Sequence)
        else [read_image(frame) for frame in item]
        for item in media
    ]


def _check_text(question: str) -> None:
    """Refuse lone surrogates, as which bytes that are no UTF-8 arrive: no tokenizer takes them."""
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise VilaDeployError(
            "the question is not valid UTF-8", fix="check the encoding of your terminal or file"
        ) from error


def _ignore(text: str) -> None:
    pass


class _Clock:
    """Milliseconds since the previous lap, by name."""

    def __init__(self) -> None:
        self.laps_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps_ms[name] = (now - self._last) * 1e3
        self._last = now
