"""Shared memory of programs that run in step, and copies into it that are on their way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.support.ptx.access_log import AccessLog, Programs
from tests.support.ptx.fault import Fault
from tests.support.ptx.numbers import UNSIGNED, Array

WORD = 4


@dataclass
class Copy:
    """Words that a cp.async brings: index in the memory, value, and the warp that asked."""

    words: Array
    values: Array
    warp: Array


class SharedMemory:
    """`size` bytes for each of `count` programs, at first all ones: NaN in every float type.

    A cp.async is as late as it may be: its bytes arrive when its threads wait for its group.

    Args:
        programs: of the grid, for the log of accesses; None logs and checks none.
    """

    def __init__(self, size: int, count: int, programs: Programs | None):
        self.size = -(-max(size, 16) // 16) * 16
        self.data = np.full(self.size * count, 0xFF, np.uint8)
        self._log = programs and AccessLog(len(self.data) // WORD, programs)
        self._open: list[Copy] = []
        self._groups: list[list[Copy]] = []

    def index(self, address: Array, program: Array, size: int) -> Array:
        """Return where the bytes at an address of each thread's program lie in `data`.

        Raises:
            Fault: outside of the program's memory, or not aligned to `size`.
        """
        if len(address) and (int(address.max()) + size > self.size or int(address.min()) < 0):
            raise Fault(f"out of bounds: shared address {int(address.max())} of {self.size}")
        if (address % size).any():
            raise Fault(f"misaligned access of {size} bytes of shared memory")
        found: Array = address + program * self.size
        return found

    def load(self, address: Array, bits: int, program: Array, warp: Array) -> Array:
        at = self.index(address, program, bits // 8)
        self.note_read(at, bits // 8, warp)
        return self.data.view(UNSIGNED[bits])[at // (bits // 8)]

    def note_read(self, at: Array, size: int, warp: Array) -> None:
        """Log a read of `size` bytes at indices of `data`."""
        if self._log is not None:
            self._log.read(*_words(at, size, warp))

    def store(self, address: Array, value: Array, bits: int, program: Array, warp: Array) -> None:
        at = self.index(address, program, bits // 8)
        if self._log is not None:
            self._log.write(*_words(at, bits // 8, warp))
        numbers, index = self.data.view(UNSIGNED[bits]), at // (bits // 8)
        numbers[index] = value
        if (numbers[index] != value).any():
            raise Fault("two threads store different values at one address of shared memory")

    def begin_copy(self, at: Array, values: Array, warp: Array) -> None:
        """Begin a cp.async of a word to each index of `data`."""
        if self._log is not None:
            self._log.begin_copy(at // WORD, warp)
        self._open.append(Copy(at // WORD, values, warp))

    def commit_group(self) -> None:
        """Make a group of the copies begun since the last one."""
        self._groups.append(self._open)
        self._open = []

    def wait_group(self, left: int) -> None:
        """Let copies arrive until only the newest `left` groups are on their way."""
        while len(self._groups) > left:
            for copy in self._groups.pop(0):
                if self._log is not None:
                    self._log.end_copy(copy.words, copy.warp)
                self.data.view(np.uint32)[copy.words] = copy.values

    def finish(self) -> None:
        """Let the copies arrive that no thread waited for."""
        self.commit_group()
        self.wait_group(0)


def _words(at: Array, size: int, warp: Array) -> tuple[Array, Array]:
    """Return the words that accesses of `size` bytes touch, and the warp of each."""
    words = at // WORD
    if size <= WORD:
        return words, warp
    count = size // WORD
    return (words[:, None] + np.arange(count)).reshape(-1), np.repeat(warp, count)
