"""Merge text and image features into one sequence of embeddings, as VILA1.5 does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.utils.arrays import Floats


def text_chunks(tokenizer: Tokenizer, prompt: str, image_end: str = "") -> list[list[int]]:
    """Return the token ids of each text chunk between image markers, with BOS once in front.

    Args:
        image_end: see ModelInfo; its tokens begin each chunk that follows an image.
    """
    first, *rest = (tokenizer.encode(text) for text in prompt.split(IMAGE_MARKER))
    end = tokenizer.encode(image_end) if image_end else []
    return [tokenizer.bos_ids + first, *(end + chunk for chunk in rest)]


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
