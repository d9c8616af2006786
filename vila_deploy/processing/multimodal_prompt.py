"""Merge text and image features into one sequence of embeddings, as VILA's code does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vila_deploy.checkpoint.variants import GENERATIONS, Generation
from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.utils.arrays import Floats


def text_chunks(
    tokenizer: Tokenizer, prompt: str, recipe: Generation = GENERATIONS["vila1.5"]
) -> list[list[int]]:
    """Return the token ids of each text chunk between image markers.

    Source: `tokenizer_image_token` in llava/mm_utils.py of NVlabs/VILA, at the parent of 36f6adc
    and of main.

    Args:
        recipe: of the model's generation; the tokens of its `image_end` begin each chunk that
            follows an image.
    """
    first, *rest = prompt.split(IMAGE_MARKER)
    first_chunk = tokenizer.bos_ids + tokenizer.encode(first)
    if recipe.marker_is_token:
        end = tokenizer.bos_ids + tokenizer.encode(recipe.image_end)
        return [first_chunk, *(end + tokenizer.encode(text, after_special=True) for text in rest)]
    chunks = [tokenizer.bos_ids + tokenizer.encode(text) for text in rest]
    # Meant for the BOS of each chunk; where the prompt's own text has begun with BOS and the
    # tokenizer adds none, the first token of each later chunk goes, in training too.
    dropped = int(bool(first_chunk) and first_chunk[0] == tokenizer.bos_id)
    return [first_chunk, *(chunk[dropped:] for chunk in chunks)]


def merge_embeddings(
    chunks: Sequence[Sequence[int]],
    features: Sequence[Floats],
    embed_tokens: Callable[[Sequence[int]], Floats],
) -> Floats:
    """Return embeddings [tokens, hidden]: chunks of text with an image's features between each two.

    Args:
        chunks: from `text_chunks`; one more than there are images.
        features: [tokens, hidden] of each image.
        embed_tokens: ids → [tokens, hidden].
    """
    assert len(chunks) == len(features) + 1
    embeddings = [embed_tokens(chunks[0])]
    for image, chunk in zip(features, chunks[1:], strict=True):
        embeddings += [image, embed_tokens(chunk)]
    return np.concatenate(embeddings)


def prompt_length(chunks: Sequence[Sequence[int]], image_tokens: Sequence[int]) -> int:
    """Return how many tokens the merged prompt has.

    Args:
        chunks: from `text_chunks`.
        image_tokens: number of tokens of each image.
    """
    assert len(chunks) == len(image_tokens) + 1
    return sum(map(len, chunks)) + sum(image_tokens)
