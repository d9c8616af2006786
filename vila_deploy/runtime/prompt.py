"""Turn the messages of a conversation into the prompt that an engine prefills."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.chat_template import (
    IMAGE_MARKER,
    PROMPT_TEMPLATES,
    render,
    with_tile_markers,
)
from vila_deploy.processing.frame_windows import frame_windows
from vila_deploy.processing.images import Pixels, preprocess
from vila_deploy.processing.multimodal_prompt import text_chunks
from vila_deploy.processing.placeholders import (
    PLACEHOLDER,
    VIDEO_PLACEHOLDERS,
    Media,
    bind_placeholders,
    check_no_placeholders,
)
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.processing.vocabulary import check_ids
from vila_deploy.utils.errors import VilaDeployError

Role = Literal["system", "user", "assistant"]
Part = str | Media  # text, an RGB image, or the frames of a video
PlaceholderRule = Literal["bind", "refuse"]
# What a cached position holds: a token, or the nth embedding of the image with a digest.
PositionKey = int | tuple[bytes, int]


@dataclass(frozen=True)
class Message:
    """One message: texts, RGB images and videos (sequences of frames) in their order."""

    role: Role
    content: tuple[Part, ...]


@dataclass(frozen=True)
class PromptImage:
    """An image of a prompt.

    Args:
        digest: SHA-256 of the pixels: images that give equal features have equal digests.
        token_counts: embeddings in each of its places in the prompt.
    """

    pixels: Pixels
    digest: bytes
    token_counts: tuple[int, ...]

    @classmethod
    def of(cls, pixels: Pixels, model: ModelInfo) -> PromptImage:
        """Return the image that the vision encoder sees as `pixels`."""
        digest = hashlib.sha256(f"{pixels.tiles.shape} {pixels.grid} {pixels.pool}".encode())
        digest.update(np.ascontiguousarray(pixels.tiles).data)
        return cls(pixels, digest.digest(), tuple(model.image_tokens(pixels)))


@dataclass(frozen=True)
class Question:
    """What the user says in one turn: text with a marker for each place of an image."""

    text: str
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """Token ids around the places that images take.

    Args:
        chunks: token ids of the text around the places; one chunk more than there are places.
        strip: whether an answer is a message, which has no spaces around it; else it goes on
            where the text ends.
    """

    chunks: tuple[tuple[int, ...], ...]
    images: tuple[PromptImage, ...] = ()
    strip: bool = True
    _lengths: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        lengths = tuple(count for image in self.images for count in image.token_counts)
        if len(self.chunks) != len(lengths) + 1:
            raise ValueError(f"{len(self.chunks)} text chunks around {len(lengths)} places")
        object.__setattr__(self, "_lengths", lengths)

    def __len__(self) -> int:
        return sum(map(len, self.chunks)) + sum(self._lengths)

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """Return the ids of all text."""
        return tuple(token for chunk in self.chunks for token in chunk)

    @cached_property
    def keys(self) -> tuple[PositionKey, ...]:
        """Return what each position holds; prompts with equal keys have equal caches."""
        return tuple(self._keys())

    def _keys(self) -> Iterator[PositionKey]:
        first, *rest = self.chunks
        yield from first
        chunks = iter(rest)
        for image in self.images:
            index = 0
            for count in image.token_counts:
                yield from ((image.digest, position) for position in range(index, index + count))
                index += count
                yield from next(chunks)


def prepare_prompt(
    messages: Sequence[Message],
    model: ModelInfo,
    tokenizer: Tokenizer,
    placeholders: PlaceholderRule = "bind",
) -> Prompt:
    """Return the prompt that asks for the answer to the last message.

    Messages of one role that follow each other count as one.

    Args:
        placeholders: "bind": `<image>` and `<video>` in a user's text take the images and videos
            of that message. "refuse": such text is an error.

    Raises:
        VilaDeployError: roles in an order that no template has, text that is no UTF-8, placeholders
            that are refused or differ from the media in number.
    """
    system, turns = _by_turn(messages)
    if system is not None:
        check_no_placeholders(system)
    questions: list[Question] = []
    for content, _ in turns:
        first = not any(question.images for question in questions)
        questions.append(prepare_question(content, model, first, placeholders))
    answered = [
        (question, _text(answer, "assistant"))
        for question, (_, answer) in zip(questions[:-1], turns[:-1], strict=True)
    ]
    return assemble_prompt(answered, questions[-1], model, tokenizer, system)


def prepare_text(text: str, tokenizer: Tokenizer) -> Prompt:
    """Return a prompt of bare text, without the model's template.

    Raises:
        VilaDeployError: it is no UTF-8, or has a placeholder.
    """
    check_utf8(text)
    check_no_placeholders(text)
    return Prompt((tuple(tokenizer.bos_ids + tokenizer.encode(text)),), strip=False)


def prepare_question(
    content: Sequence[Part],
    model: ModelInfo,
    first: bool = True,
    placeholders: PlaceholderRule = "bind",
) -> Question:
    """Return a user's message with its images as the vision encoder takes them.

    Images before or behind all text come first, each with a newline, as the models were trained.
    Between two texts they stay where they are.

    Args:
        first: whether no earlier turn had an image. Models with dynamic tiles cut an image into
            tiles where it is the only one, which is only known of the first turn with images.
    """
    texts = [part for part in content if isinstance(part, str)]
    media = [part for part in content if not isinstance(part, str)]
    for text in texts:
        check_utf8(text)
    joined = "\n".join(texts)
    if placeholders == "refuse":
        check_no_placeholders(joined)
    if _is_interleaved(content) and not PLACEHOLDER.search(joined):
        joined = _interleave(content, model.image_end)
    text, pixels = place_images(joined, media, model, first)
    return Question(text, tuple(PromptImage.of(image, model) for image in pixels))


def assemble_prompt(
    turns: Sequence[tuple[Question, str]],
    question: Question,
    model: ModelInfo,
    tokenizer: Tokenizer,
    system: str | None = None,
) -> Prompt:
    """Return the prompt that asks `question` behind earlier questions with their answers."""
    # An answer may spell a marker; in a prompt it would ask for an image.
    rendered = [(earlier.text, without_markers(answer)) for earlier, answer in turns]
    text = render(PROMPT_TEMPLATES[model.prompt], rendered, question.text, system)
    chunks = text_chunks(tokenizer, text, model.recipe)
    check_ids(tokenizer, chunks, model.vocab_size)
    images = [image for asked in (*(q for q, _ in turns), question) for image in asked.images]
    return Prompt(tuple(map(tuple, chunks)), tuple(images))


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
    media = [_in_windows(item, model) for item in media]
    question, images = bind_placeholders(question, media, model.image_end)
    pixels = preprocess(images, model.image, model.tiling, alone=first)
    alone = first and len(pixels) == 1 and pixels[0].pool is None
    if model.tiling.mode == "dynamic" and alone:
        question = with_tile_markers(question, len(pixels[0].tiles))
    return question, pixels


def _in_windows(media: Media, model: ModelInfo) -> Media:
    """Return an image as it is, and for a video what takes its places in the prompt."""
    return media if isinstance(media, Image.Image) else frame_windows(media, model.video)


def without_markers(text: str) -> str:
    """Return `text` without image markers, those that removing one would make included."""
    while IMAGE_MARKER in text:
        text = text.replace(IMAGE_MARKER, "")
    return text


def check_utf8(text: str) -> None:
    """Refuse lone surrogates, as which bytes that are no UTF-8 arrive: no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise VilaDeployError(
            "the question is not valid UTF-8", fix="check the encoding of your terminal or file"
        ) from error


def check_prompt_length(length: int, limit: int, advice: str = "") -> None:
    """Raise VilaDeployError if a prompt of `length` tokens is longer than the engine's `limit`.

    Args:
        advice: what else the user may do, before the advice that always holds.
    """
    if length > limit:
        raise VilaDeployError(
            f"the prompt takes {length} tokens, this engine takes {limit}",
            fix=f"{advice}use fewer images, a shorter prompt, or build with a larger "
            "--max-input-len",
        )


def _by_turn(
    messages: Sequence[Message],
) -> tuple[str | None, list[tuple[tuple[Part, ...], tuple[Part, ...]]]]:
    """Return the system message and the turns (question, answer); the last has no answer."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role:
            message = Message(message.role, (*merged.pop().content, *message.content))
        merged.append(message)
    system = None
    if merged and merged[0].role == "system":
        system = _text(merged.pop(0).content, "system")
    expected: tuple[Role, Role] = ("user", "assistant")
    for index, message in enumerate(merged):
        if message.role != expected[index % 2]:
            raise VilaDeployError(
                f"a message of role {message.role!r} stands where one of role "
                f"{expected[index % 2]!r} belongs",
                fix="begin with system messages, if any, then let user and assistant take turns",
            )
    if len(merged) % 2 == 0:
        raise VilaDeployError(
            "the last message is not the user's", fix="end with a message of role 'user'"
        )
    contents = [message.content for message in merged]
    answers = [*contents[1::2], ()]
    return system, list(zip(contents[0::2], answers, strict=True))


def _text(content: Sequence[Part], role: Role) -> str:
    texts = [part for part in content if isinstance(part, str)]
    if len(texts) < len(content):
        raise VilaDeployError(
            f"a message of role {role!r} holds an image",
            fix="give images in messages of role 'user'",
        )
    text = "\n".join(texts)
    check_utf8(text)
    return text


def _is_interleaved(content: Sequence[Part]) -> bool:
    """Return whether media stand between texts."""
    text_places = [index for index, part in enumerate(content) if isinstance(part, str)]
    return bool(text_places) and text_places[-1] - text_places[0] + 1 > len(text_places)


def _interleave(content: Sequence[Part], image_end: str) -> str:
    """Return the text with a placeholder for each image and video where it stands."""
    text, previous_is_text = "", False
    for part in content:
        if isinstance(part, str):
            text += f"\n{part}" if previous_is_text else part
        else:
            name = IMAGE_MARKER if isinstance(part, Image.Image) else VIDEO_PLACEHOLDERS[0]
            text += name if image_end else f"{name}\n"
        previous_is_text = isinstance(part, str)
    return text
