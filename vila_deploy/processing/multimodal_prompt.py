"""A prompt with pictures in it as one sequence of embeddings, the way VILA1.5 splices them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.utils.arrays import Floats


def text_chunks(tokenizer: Tokenizer, prompt: str, image_end: str = "") -> list[list[int]]:
    """Token ids of each stretch of text between image markers, BOS once in front.

    Args:
        image_end: see ModelInfo; its tokens begin each piece that follows a picture.
    """
    first, *rest = (tokenizer.encode(text) for text in prompt.split(IMAGE_MARKER))
    end = tokenizer.encode(image_end) if image_end else []
    return [tokenizer.bos_ids + first, *(end + piece for piece in rest)]


def merge_embeddings(
    pieces: Sequence[Sequence[int]],
    features: Sequence[Floats],
    embed_tokens: Callable[[Sequence[int]], Floats],
) -> Floats:
    """Token embeddings with a picture's features between each two pieces → [tokens, hidden].

    Args:
        pieces: from `text_chunks`; one more than there are pictures.
        features: [tokens, hidden] of each picture.
        embed_tokens: ids → [tokens, hidden].
    """
    assert len(pieces) == len(features) + 1
    parts = [embed_tokens(pieces[0])]
    for image, piece in zip(features, pieces[1:], strict=True):
        parts += [image, embed_tokens(piece)]
    return np.concatenate(parts)


def prompt_length(pieces: Sequence[Sequence[int]], image_tokens: Sequence[int]) -> int:
    """How many positions the spliced prompt takes; `image_tokens` are those of each picture."""
    assert len(pieces) == len(image_tokens) + 1
    return sum(map(len, pieces)) + sum(image_tokens)
