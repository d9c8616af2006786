"""Run the decoder graphs over key/value caches that are bound in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from vila_deploy.utils.arrays import Floats

# Keys or values: float32, or int8 with scales in the graph.
Cache = NDArray[np.float32 | np.int8]


class BoundGraph:
    """A decoder graph with rows of the cache bound: each buffer is both input and output.

    Args:
        cache: key and value of each layer in turn, [rows, kv_heads, max_seq_len, head_dim].
        logits: [rows, vocab], written by each run; None for a graph that only fills the cache.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        cache: Sequence[Cache],
        logits: Floats | None,
    ):
        self._session, self._io = session, session.io_binding()
        self._run_options = onnxruntime.RunOptions()
        self._seqlens_k = np.zeros(len(cache[0]), np.int32)
        self._total = np.zeros((), np.int32)
        self._bind("seqlens_k", self._seqlens_k)
        self._bind("total_sequence_length", self._total)
        if logits is not None:
            self._bind("logits", logits, output=True)
        names = [f"{kind}_{layer}" for layer in range(len(cache) // 2) for kind in ("key", "value")]
        for name, buffer in zip(names, cache, strict=True):
            self._bind(f"past_{name}", buffer)
            self._bind(f"present_{name}", buffer, output=True)
        # onnxruntime keeps bare addresses: these arrays must live as long as the binding.
        self._bound_arrays = [*cache, logits]

    def bind_embeds(self, embeds: Floats) -> None:
        """Bind the input [rows, tokens, hidden] of the next runs."""
        self._embeds = np.ascontiguousarray(embeds)
        self._bind("inputs_embeds", self._embeds)

    def run(self, totals: Sequence[int]) -> None:
        """Run one pass; afterwards each row of the cache holds as many tokens as `totals` says."""
        self._seqlens_k[:] = totals
        self._seqlens_k -= 1
        self._total[...] = max(totals)
        self._session.run_with_iobinding(self._io, self._run_options)

    def output_addresses(self) -> set[int]:
        """Return where the graph writes its outputs."""
        return {value.data_ptr() for value in self._io.get_outputs()}

    def _bind(self, name: str, array: NDArray[np.generic], output: bool = False) -> None:
        bind = self._io.bind_output if output else self._io.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class CacheRows:
    """Key/value caches of several slots, and which row of the buffers each slot has.

    A graph takes rows that follow each other, so slots that decode together are moved there.

    Args:
        slots: sequences that are held.
        rows: rows of each buffer, at least as many.
        shape: (layers, kv_heads, max_seq_len, head_dim).
        dtype: of keys and values.
    """

    def __init__(
        self,
        slots: int,
        rows: int,
        shape: tuple[int, int, int, int],
        dtype: type[np.float32 | np.int8] = np.float32,
    ):
        layers, *dims = shape
        self.buffers = [np.zeros((rows, *dims), dtype) for _ in range(2 * layers)]
        if slots > 1:
            # Written once, lest a server's memory grow for minutes, or end, while it answers.
            for buffer in self.buffers:
                buffer.fill(0)
        self.lengths = [0] * slots
        self._row_of = list(range(slots))

    def row(self, slot: int) -> int:
        return self._row_of[slot]

    def slot(self, row: int) -> int | None:
        """Return the slot in a row; None for a row that only fills up a pass."""
        return self._row_of.index(row) if row in self._row_of else None

    def window(self, start: int, count: int) -> list[Cache]:
        """Return `count` rows of every buffer."""
        return [buffer[start : start + count] for buffer in self.buffers]

    def gather(self, slots: Sequence[int], count: int) -> int:
        """Move `slots` into `count` rows that follow each other; return the first of these."""
        rows = [self._row_of[slot] for slot in slots]
        starts = range(len(self.buffers[0]) - count + 1)
        start = max(starts, key=lambda start: sum(start <= row < start + count for row in rows))
        window = range(start, start + count)
        free = iter([row for row in window if row not in rows])
        for slot in slots:
            if self._row_of[slot] not in window:
                self._move(slot, next(free))
        return start

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Make `target` hold the first `tokens` of `source`."""
        old, new = self._row_of[source], self._row_of[target]
        for buffer in self.buffers:
            buffer[new, :, :tokens] = buffer[old, :, :tokens]
        self.lengths[target] = tokens

    def _move(self, slot: int, row: int) -> None:
        """Exchange the rows of `slot` and of the slot that is in `row`, if any."""
        old, other = self._row_of[slot], self.slot(row)
        length = self.lengths[slot]
        other_length = 0 if other is None else self.lengths[other]
        for buffer in self.buffers:
            displaced = buffer[row, :, :other_length].copy()
            buffer[row, :, :length] = buffer[old, :, :length]
            buffer[old, :, :other_length] = displaced
        self._row_of[slot] = row
        if other is not None:
            self._row_of[other] = old

    def first_positions(self, rows: Sequence[int]) -> list[Cache]:
        """Return copies of keys and values of the first token of each of `rows`."""
        return [buffer[list(rows), :, 0] for buffer in self.buffers]

    def restore_first_positions(self, rows: Sequence[int], saved: Sequence[Cache]) -> None:
        """Write back what `first_positions` returned."""
        for buffer, values in zip(self.buffers, saved, strict=True):
            buffer[list(rows), :, 0] = values
