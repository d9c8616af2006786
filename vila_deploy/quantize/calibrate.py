"""Calibration through the real model: examples become what enters the first decoder layer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.session import Floats
from vila_deploy.errors import VilaDeployError
from vila_deploy.model.images import preprocess
from vila_deploy.model.prompts import (
    PROMPT_TEMPLATES,
    choose_template,
    render,
    render_answered,
    with_markers,
)
from vila_deploy.model.splice import prompt_pieces, splice
from vila_deploy.model.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.quantize.examples import Example, Picture

MAX_SEQUENCES = 128
MAX_TOKENS = 512
MIN_BLOCK_TOKENS = 16
MAX_TEXT_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """The embeddings [tokens, hidden] of each sequence, and what they are made of."""

    embeds: list[Tensor]
    text_sequences: int
    image_sequences: int
    images: int
    tokens: int
    image_tokens: int
    sha256: str


@dataclass(frozen=True)
class _Sequence:
    """Token ids, with a picture between each two pieces."""

    pieces: list[list[int]]
    pictures: tuple[Picture, ...] = ()


def calibrate(checkpoint: Checkpoint, examples: Sequence[Example], seed: int) -> Calibration:
    """At most 128 sequences, pictures spliced into the text the way VILA does it.

    Plain texts and conversations are joined and cut into blocks of at most 512 tokens, as llm-awq
    does; a conversation about pictures is a sequence of its own, up to 512 tokens besides its
    pictures. Pictures take at most half of the sequences as long as there is text for the others.

    Raises:
        VilaDeployError: a picture can't be read, or the tokenizer doesn't belong to the model.
    """
    config = checkpoint.config
    tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    blocks = _text_blocks(shuffled, tokenizer, config)
    conversations = [_conversation(e, tokenizer, config) for e in shuffled if e.pictures]
    conversations = conversations[: max(MAX_SEQUENCES // 2, MAX_SEQUENCES - len(blocks))]
    sequences = conversations + blocks[: MAX_SEQUENCES - len(conversations)]
    if not sequences:
        raise VilaDeployError("calibration data gives no tokens", fix="give longer texts")
    pictures = {p.name: p for sequence in sequences for p in sequence.pictures}
    digest = hashlib.sha256()
    features = _encode(checkpoint, pictures, digest)
    table = checkpoint.llm.tensor("model.embed_tokens.weight")

    def embed_tokens(ids: Sequence[int]) -> Floats:
        if ids and max(ids) >= len(table):
            raise VilaDeployError(
                f"its token {max(ids)} is outside the embedding of {len(table)} rows",
                where=checkpoint.layout.folder("llm"),
                fix="use the tokenizer files that belong to this checkpoint",
            )
        return table[torch.tensor(list(ids), dtype=torch.int64)].float().numpy()

    embeds, image_tokens = [], 0
    for sequence in sequences:
        own = [features[picture.name] for picture in sequence.pictures]
        limit = _limit(config, len(own))
        spliced = splice(sequence.pieces, own, embed_tokens)[:limit]
        embeds.append(torch.from_numpy(spliced))
        image_tokens += _image_tokens(sequence.pieces, config.tokens_per_block, limit)
        digest.update(repr((sequence.pieces, [p.name for p in sequence.pictures])).encode())
    return Calibration(
        embeds=embeds,
        text_sequences=len(sequences) - len(conversations),
        image_sequences=len(conversations),
        images=len(pictures),
        tokens=sum(map(len, embeds)),
        image_tokens=image_tokens,
        sha256=digest.hexdigest(),
    )


def _limit(config: VilaConfig, num_images: int) -> int:
    longest = MAX_TOKENS + num_images * config.tokens_per_block
    return min(longest, config.model_max_length, config.llm.max_position_embeddings)


def _image_tokens(pieces: Sequence[Sequence[int]], per_image: int, limit: int) -> int:
    """How many of the first `limit` positions come from pictures."""
    total = position = 0
    for piece in pieces[:-1]:
        position += len(piece)
        total += max(0, min(per_image, limit - position))
        position += per_image
    return total


def _text_blocks(
    examples: Sequence[Example], tokenizer: Tokenizer, config: VilaConfig
) -> list[_Sequence]:
    """All texts without pictures as one stream of tokens, each after a BOS, cut into blocks."""
    limit = _limit(config, 0)
    stream: list[int] = []
    for example in (e for e in examples if not e.pictures):
        text = example.text if example.is_plain else _rendered(example, tokenizer, config)
        stream += tokenizer.bos_ids + tokenizer.encode(text[:MAX_TEXT_CHARACTERS])
        if len(stream) >= MAX_SEQUENCES * limit:
            break
    starts = range(0, len(stream), limit)
    blocks = [stream[start : start + limit] for start in starts]
    kept = [block for block in blocks if len(block) >= MIN_BLOCK_TOKENS] or blocks[:1]
    return [_Sequence([block]) for block in kept]


def _conversation(example: Example, tokenizer: Tokenizer, config: VilaConfig) -> _Sequence:
    text = _rendered(example, tokenizer, config)
    return _Sequence(prompt_pieces(tokenizer, text, config.image_end), example.pictures)


def _rendered(example: Example, tokenizer: Tokenizer, config: VilaConfig) -> str:
    """The example as a turn of the model's own conversation template."""
    template = PROMPT_TEMPLATES[choose_template(config, tokenizer)]
    question = with_markers(example.text, len(example.pictures), config.image_end)
    if example.answer is None:
        return render(template, [], question)
    return render_answered(template, question, example.answer)


def _encode(
    checkpoint: Checkpoint, pictures: dict[str, Picture], digest: hashlib._Hash
) -> dict[str, Floats]:
    """Features [tokens, hidden] of each picture; the tower is in memory only during this."""
    if not pictures:
        return {}
    config = checkpoint.config
    encoder = VisionEncoder(config, checkpoint.vision, checkpoint.projector)
    features: dict[str, NDArray[np.float32]] = {}
    for name, picture in pictures.items():
        # As if it were one of several: cut into dynamic tiles, pictures would drown the text.
        (pixels,) = preprocess([picture.load()], config.image, config.tiling, alone=False)
        digest.update(pixels.tiles.tobytes())
        features[name] = encoder(torch.from_numpy(pixels.tiles), pixels.grid)[0].numpy()
    return features
