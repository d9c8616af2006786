"""Global memory: the tensors that a launch was given, and nothing beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.support.ptx.access_log import AccessLog, Programs
from tests.support.ptx.fault import Fault
from tests.support.ptx.numbers import UNSIGNED, Array


@dataclass
class Region:
    """Bytes [start, start + len(data)) that a kernel may touch.

    Args:
        cell: bytes of a number in it, for the log of accesses.
    """

    start: int
    data: Array
    name: str
    cell: int = 4
    log: AccessLog | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def cells(self, offset: Array, size: int) -> Array:
        """Return the cells that accesses of `size` bytes at byte offsets touch."""
        first = offset // self.cell
        count = max(1, size // self.cell)
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)


class GlobalMemory:
    """Loads and stores of many threads at once, each within one region and aligned.

    Overlapping regions, e.g. a tensor that is given twice, are one.
    """

    def __init__(self, regions: Sequence[Region]):
        self._regions: list[Region] = []
        for region in sorted(regions, key=lambda region: (region.start, -region.end)):
            if self._regions and region.start < self._regions[-1].end:
                last = self._regions[-1]
                if region.end > last.end:
                    raise ValueError(f"{last.name} and {region.name} overlap in part")
                last.name += f", {region.name}" if region.name not in last.name else ""
                last.cell = min(last.cell, region.cell)
            else:
                self._regions.append(region)
        self._starts = np.array([region.start for region in self._regions], np.uint64)

    def watch(self, addresses: set[int], programs: Programs) -> None:
        """Log accesses to the regions that hold these addresses, and check them for races."""
        for region in self._regions:
            if any(region.start <= address < region.end for address in addresses):
                region.log = AccessLog(-(-len(region.data) // region.cell), programs)

    def locate(self, address: Array, size: int) -> list[tuple[Region, Array | slice]]:
        """Return each region that accesses of `size` bytes meet, with which of them do.

        Raises:
            Fault: an access is not within one region, or not aligned to its size.
        """
        if (address % np.uint64(size)).any():
            raise Fault(f"misaligned access of {size} bytes")
        index = np.searchsorted(self._starts, address, side="right") - 1
        low, high = int(index.min()), int(index.max())
        found: list[tuple[Region, Array | slice]] = []
        for at in [low] if low == high else np.unique(index).tolist():
            which = slice(None) if low == high else index == at
            last = int(address[which].max())
            if at < 0 or last + size > self._regions[at].end:
                name = self._regions[max(at, 0)].name
                end = self._regions[max(at, 0)].end
                raise Fault(f"out of bounds: {size} bytes at {last - end:+} from the end of {name}")
            found.append((self._regions[at], which))
        return found

    def load(self, address: Array, bits: int, warp: Array | None = None) -> Array:
        """Return what stands at each address.

        Args:
            warp: of each thread, for the log; None logs nothing.
        """
        size, out = bits // 8, np.empty(len(address), UNSIGNED[bits])
        for region, which in self.locate(address, size):
            offset = (address[which] - np.uint64(region.start)).astype(np.int64)
            if region.log is not None and warp is not None:
                region.log.read(region.cells(offset, size), _each(warp[which], size, region.cell))
            out[which] = _numbers_at(region, offset, bits)
        return out

    def store(self, address: Array, value: Array, bits: int, warp: Array) -> None:
        """Store each value; two threads may store at one address only the same value."""
        size = bits // 8
        for region, which in self.locate(address, size):
            offset = (address[which] - np.uint64(region.start)).astype(np.int64)
            values = np.ascontiguousarray(value[which]).view(UNSIGNED[bits])
            if region.log is not None:
                region.log.write(region.cells(offset, size), _each(warp[which], size, region.cell))
            if region.start % size == 0 and len(region.data) % size == 0:
                region.data.view(UNSIGNED[bits])[offset // size] = values
            else:
                parts = values.view(np.uint8).reshape(-1, size)
                region.data[offset[:, None] + np.arange(size)] = parts
            if (_numbers_at(region, offset, bits) != values).any():
                raise Fault(f"two threads store different values at one address of {region.name}")

    def add(self, address: int, value: int) -> int:
        """Add to the 32-bit number at the address as one step; return what was there before."""
        ((region, _),) = self.locate(np.array([address], np.uint64), 4)
        offset = address - region.start
        number = region.data[offset : offset + 4].view(np.uint32)
        before = int(number[0])
        number[0] = (before + value) & 0xFFFFFFFF
        return before


def _numbers_at(region: Region, offset: Array, bits: int) -> Array:
    size = bits // 8
    if region.start % size == 0 and len(region.data) % size == 0:
        numbers: Array = region.data.view(UNSIGNED[bits])[offset // size]
        return numbers
    return np.ascontiguousarray(region.data[offset[:, None] + np.arange(size)]).view(
        UNSIGNED[bits]
    )[:, 0]


def _each(warp: Array, size: int, cell: int) -> Array:
    """Return the warp of each cell that accesses of `size` bytes touch."""
    return warp if size <= cell else np.repeat(warp, size // cell)
