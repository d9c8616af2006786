"""Estimate, without a tokenizer, how many tokens and images a set of examples gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.data.examples import Example
from vila_deploy.utils.limits import MAX_TOKENS

# Typical of English with the supported models' tokenizers; and what the template adds to a turn.
CHARACTERS_PER_TOKEN = 4
TEMPLATE_TOKENS = 40


@dataclass(frozen=True)
class DataSize:
    """The size of a set of examples.

    Args:
        tokens: positions of all sequences, images included.
        image_tokens: positions of all different images, once each.
        tiles: how many tiles the vision tower encodes for them.
        tiles_at_once: tiles of one image.
    """

    tokens: int
    image_tokens: int = 0
    tiles: int = 0
    tiles_at_once: int = 0


def data_size(config: VilaConfig, examples: Sequence[Example], max_sequences: int) -> DataSize:
    """Return the size of at most so many sequences, of which images take half if texts suffice."""
    texts = sum(_tokens(e) for e in examples if not e.images)
    limit = min(MAX_TOKENS, config.model_max_length, config.llm.max_position_embeddings)
    text_samples = min(-(-texts // limit), max_sequences)
    about_images = [e for e in examples if e.images]
    about_images = about_images[: max(max_sequences // 2, max_sequences - text_samples)]
    texts = min(texts, (max_sequences - len(about_images)) * limit)
    per_image = config.tokens_per_block
    conversations = sum(_tokens(e) + per_image * len(e.images) for e in about_images)
    different = len({image.name for e in about_images for image in e.images})
    tiling = config.tiling
    tiles = max(1, sum((scale // tiling.tile) ** 2 for scale in tiling.scales))
    tokens, at_once = max(1, texts + conversations), tiles if different else 0
    return DataSize(tokens, different * per_image, different * tiles, at_once)


def _tokens(example: Example) -> int:
    if example.is_plain:
        return 1 + len(example.text) // CHARACTERS_PER_TOKEN
    characters = len(example.text) + len(example.answer or "")
    characters += sum(len(question) + len(answer) for question, answer in example.turns)
    return TEMPLATE_TOKENS * (1 + len(example.turns)) + characters // CHARACTERS_PER_TOKEN
