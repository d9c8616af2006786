"""A conversation about images with a running engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import Session
from vila_deploy.processing.chat_template import (
    IMAGE_MARKER,
    PROMPT_TEMPLATES,
    render,
    with_markers,
    with_tile_markers,
)
from vila_deploy.processing.images import Pixels, preprocess
from vila_deploy.processing.multimodal_prompt import merge_embeddings, prompt_length, text_chunks
from vila_deploy.processing.tokenizer import TextStream, Tokenizer
from vila_deploy.runtime.generate import generate
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError


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
    question: str, images: Sequence[Image.Image], model: ModelInfo, first: bool = True
) -> tuple[str, list[Pixels]]:
    """`question` with a marker for each place that a image takes, and the images' pixels.

    Args:
        first: whether no earlier turn had a image.

    Raises:
        VilaDeployError: markers and images differ in number.
    """
    question = with_markers(question, len(images), model.image_end)
    pixels = preprocess(images, model.image, model.tiling, alone=first)
    if model.tiling.mode == "dynamic" and len(images) == 1 and first:
        question = with_tile_markers(question, len(pixels[0].tiles))
    return question, pixels


def encode_images(session: Session, pixels: Sequence[Pixels]) -> list[Floats]:
    """Features [tokens, hidden] for each place that the images take in the prompt."""
    encoded = (session.encode_images(image.tiles, image.grid) for image in pixels)
    return [features for image in encoded for features in image]


@dataclass
class Conversation:
    """Questions about images, one after the other; earlier turns stay in the prompt.

    The original answers one question at a time, and cuts a image into dynamic tiles where it is
    the only one. Here that is the first image of a conversation, if it comes alone.

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
        images: list[Image.Image],
        sampling: SamplingParams,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Answers `question`, handing text to `on_text` as it comes, and remembers the turn.

        Args:
            images: new images of this turn, in the order of their markers in `question`.

        Raises:
            VilaDeployError: markers and images differ in number, or the prompt is too long.
        """
        clock = _Clock()
        _check_text(question)
        question, pixels = place_images(question, images, self.model, first=not self._features)
        clock.lap("preprocess")
        prompt = render(PROMPT_TEMPLATES[self.model.prompt], self.turns, question)
        pieces = text_chunks(self.tokenizer, prompt, self.model.image_end)
        new_tokens = [count for image in pixels for count in self.model.tokens_of(image)]
        length = prompt_length(pieces, [*map(len, self._features), *new_tokens])
        self._check_length(length)
        features = [*self._features, *encode_images(self.session, pixels)]
        clock.lap("vision")
        embeds = merge_embeddings(pieces, features, self.session.embed_tokens)

        stream, text = TextStream(self.tokenizer), ""
        tokens: list[int] = []
        for token in generate(self.session, embeds, self.model.stop_token_ids, sampling):
            if not tokens:
                clock.lap("prefill")
            tokens.append(token)
            shown = stream.push(token)
            if not text:
                shown = shown.lstrip()
            text += shown
            on_text(shown)
        rest = stream.finish()
        on_text(rest)
        clock.lap("decode")
        text = (text + rest).strip()
        # An answer may spell a marker; in later prompts it would ask for a image.
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
        """Begins anew: no turns, no images."""
        self.turns, self._features = [], []

    def _check_length(self, length: int) -> None:
        limit = min(self.max_input_len, self.session.max_seq_len)
        if length > limit:
            raise VilaDeployError(
                f"the prompt takes {length} tokens, this engine takes {limit}",
                fix="use fewer images, a shorter prompt, or build with a larger --max-input-len",
            )

    def _finish_reason(self, tokens: list[int], sampling: SamplingParams) -> str:
        if tokens and tokens[-1] in self.model.stop_token_ids:
            return "stop"
        return "length" if len(tokens) == sampling.max_new_tokens else "context"


def _check_text(question: str) -> None:
    """Bytes that are no UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise VilaDeployError(
            "the question is not valid UTF-8", fix="check the encoding of your terminal or file"
        ) from error


class _Clock:
    """Milliseconds since the previous lap, by name."""

    def __init__(self) -> None:
        self.laps_ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps_ms[name] = (now - self._last) * 1e3
        self._last = now
