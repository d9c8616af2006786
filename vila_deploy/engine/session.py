"""What every backend offers to run a built engine: the same calls, numpy in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vila_deploy.utils.arrays import Floats


class Session(Protocol):
    """A running engine with one conversation's key/value cache.

    `position` counts the cached tokens; `max_seq_len` is the most that fit.
    """

    position: int
    max_seq_len: int

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Tiles [tiles, 3, size, size] → projected features [images, tokens, hidden].

        Args:
            grid: None: every tile is an image of its own. (rows, columns): the tiles are one image
                at all its scales, and this is how those of the largest lie.
        """
        ...

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        """Token ids → rows of the embedding table [tokens, hidden]."""
        ...

    def prefill(self, embeds: Floats) -> Floats:
        """Appends [tokens, hidden] to the cache → logits of the last token [vocab]."""
        ...

    def decode(self, token: int) -> Floats:
        """Appends one token to the cache → logits [vocab]."""
        ...

    def reset(self) -> None:
        """Forgets the conversation: position 0, cache kept allocated."""
        ...

    def close(self) -> None:
        """Frees the engine; the session can't be used afterwards."""
        ...
