"""A launch that was executed, to be executed again: as it was, or with a changed kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.support.ptx.fault import Fault
from tests.support.ptx.global_memory import GlobalMemory, Region
from tests.support.ptx.launch import launch
from tests.support.ptx.machine import Machine, Options
from tests.support.ptx.numbers import Array
from tests.support.ptx.parse import Kernel


@dataclass(frozen=True)
class Replay:
    """A launch with copies of all tensors, before and after it.

    Args:
        before, after: each tensor's region; its data are copies.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: dict[str, bytes]
    shared_bytes: int
    options: Options
    before: list[Region]
    after: list[Array]

    def run(self, kernel: Kernel, options: Options | None = None) -> tuple[Machine, bool]:
        """Execute `kernel` in place of the launch's own; return whether the bytes are the same.

        Raises:
            Fault: it does something wrong.
        """
        regions: list[Region] = []
        for region in sorted(self.before, key=lambda region: (region.start, -region.end)):
            # A tensor within another, or given twice, shares its bytes.
            data = region.data.copy()
            if regions and region.end <= regions[-1].end:
                offset = region.start - regions[-1].start
                data = regions[-1].data[offset : offset + len(data)]
            regions.append(Region(region.start, data, region.name, region.cell))
        machine = launch(
            kernel, self.grid, self.arguments, GlobalMemory(regions), self.shared_bytes,
            options or self.options,
        )  # fmt: skip
        expected = dict[int, Array]()
        for region, after in zip(self.before, self.after, strict=True):
            if len(after) >= len(expected.get(region.start, ())):
                expected[region.start] = after
        return machine, all(
            np.array_equal(region.data, expected[region.start][: len(region.data)])
            for region in regions
        )


def difference(replay: Replay, kernel: Kernel, options: Options) -> str | None:
    """Return how a changed kernel shows itself in a launch, None if not at all."""
    try:
        _, same = replay.run(kernel, options)
    except Fault as fault:
        return str(fault)
    return None if same else "other results"
