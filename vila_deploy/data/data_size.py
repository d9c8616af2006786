"""How many tokens and pictures a set of examples gives, estimated without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.data.examples import Example
from vila_deploy.utils.limits import MAX_TOKENS

# Of English, by the tokenizers of the supported models; and what the template adds to a turn.
CHARACTERS_PER_TOKEN = 4
TEMPLATE_TOKENS = 40


@dataclass(frozen=True)
class DataSize:
    """Of a set of examples.

    Args:
        tokens: of all sequences, pictures' among them.
        picture_tokens: of all different pictures, once each.
        tiles: that the tower encodes of them.
        tiles_at_once: of a picture.
    """

    tokens: int
    picture_tokens: int = 0
    tiles: int = 0
    tiles_at_once: int = 0


def data_size(config: VilaConfig, examples: Sequence[Example], most_sequences: int) -> DataSize:
    """Of at most so many sequences, half of them about pictures if there is text for the others."""
    texts = sum(_tokens(e) for e in examples if not e.pictures)
    limit = min(MAX_TOKENS, config.model_max_length, config.llm.max_position_embeddings)
    blocks = min(-(-texts // limit), most_sequences)
    about_pictures = [e for e in examples if e.pictures]
    about_pictures = about_pictures[: max(most_sequences // 2, most_sequences - blocks)]
    texts = min(texts, (most_sequences - len(about_pictures)) * limit)
    each = config.tokens_per_block
    spliced = sum(_tokens(e) + each * len(e.pictures) for e in about_pictures)
    different = len({picture.name for e in about_pictures for picture in e.pictures})
    tiling = config.tiling
    tiles = max(1, sum((scale // tiling.tile) ** 2 for scale in tiling.scales))
    tokens, at_once = max(1, texts + spliced), tiles if different else 0
    return DataSize(tokens, different * each, different * tiles, at_once)


def _tokens(example: Example) -> int:
    if example.is_plain:
        return 1 + len(example.text) // CHARACTERS_PER_TOKEN
    characters = len(example.text) + len(example.answer or "")
    return TEMPLATE_TOKENS + characters // CHARACTERS_PER_TOKEN
