"""A sequence as TensorRT-LLM's requests take it: token ids, and rows of the prompt table."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from vila_deploy.utils.arrays import Floats


class PromptSequence:
    """Tokens of a sequence; embeddings are rows of a table, with ids from `first_row_id` on.

    So images and text of a prompt are treated alike. Decoded tokens keep their own ids, as the
    runtime stores them: a sequence that is asked again then finds its blocks in the cache.
    """

    def __init__(self, first_row_id: int, hidden_size: int):
        self._first_row_id = first_row_id
        self._table: NDArray[np.float16] = np.empty((0, hidden_size), np.float16)
        self._row_hashes: list[int] = []
        self.ids: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def table(self) -> NDArray[np.float16]:
        """Return the prompt table [rows, hidden], in the type of the engine's weights."""
        return self._table

    @property
    def extra_ids(self) -> list[int]:
        """Return 64 bits for each token that tell rows of the same id apart; 0 for other tokens."""
        rows = iter(self._row_hashes)
        return [next(rows) if self._is_row(token) else 0 for token in self.ids]

    def append_embeds(self, embeds: Floats) -> None:
        """Append [tokens, hidden]."""
        rows = np.ascontiguousarray(embeds, np.float16)
        start = self._first_row_id + len(self._table)
        self.ids += range(start, start + len(rows))
        self._row_hashes += map(_hash, rows)
        self._table = np.concatenate([self._table, rows])

    def append_token(self, token: int) -> None:
        """Append a decoded token."""
        self.ids.append(token)

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`."""
        del self.ids[tokens:]
        rows = sum(map(self._is_row, self.ids))
        del self._row_hashes[rows:]
        self._table = self._table[:rows]

    def _is_row(self, token: int) -> bool:
        return token >= self._first_row_id


def _hash(row: NDArray[np.float16]) -> int:
    return int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little")
