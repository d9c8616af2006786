"""The emulated GPU: Triton compiles for it and launches on it as on a real one.

Tensors stay on the CPU; a launch may touch those that it was given and nothing else.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from tests.support.emulator.libcuda import (
    COOPERATIVE,
    PROGRAMMATIC_STREAM_SERIALIZATION,
    LaunchCall,
)
from tests.support.emulator.replay import Replay
from tests.support.ptx.global_memory import GlobalMemory, Region
from tests.support.ptx.launch import launch
from tests.support.ptx.machine import MAX_STEPS, Options
from tests.support.ptx.parse import Kernel, parse
from vila_deploy.kernels.capability import ComputeCapability


@dataclass(frozen=True)
class Record:
    """One launch that was executed; of its memory it keeps nothing.

    Args:
        threads: of the grid.
        instructions: how many were executed.
        peak_register_bytes: of all threads that ran in step.
        attributes: of the launch, by CUDA's identifiers.
        replay: what executes it again, if the device keeps that.
    """

    kernel: Kernel
    threads: int
    instructions: int
    peak_register_bytes: int
    attributes: dict[int, int]
    replay: Replay | None

    @property
    def name(self) -> str:
        return self.kernel.name


@dataclass
class EmulatedDevice:
    """A GPU of a compute capability.

    Args:
        races: accesses are logged and checked for races.
        keep: launches are kept with copies of their tensors, to be executed again.
        records: the launches so far.
        counts: of launches, by compute capability and kernel.
        capturing: a launch is added here instead of being executed.
    """

    capability: ComputeCapability
    races: bool = True
    max_steps: int = MAX_STEPS
    keep: bool = False
    records: list[Record] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    capturing: list[Callable[[], None]] | None = None
    callback: Any = None
    _kernels: list[Kernel] = field(default_factory=list)
    _tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    _error: BaseException | None = None

    def add_kernel(self, ptx: str) -> int:
        """Return the number by which launches will name the kernel."""
        self._kernels.append(parse(ptx))
        return len(self._kernels)

    def begin(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Take the tensors that the next launch may touch."""
        self._tensors = tensors

    def end(self) -> None:
        """Raise what went wrong in the last launch."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def execute(self, call: LaunchCall) -> None:
        """Execute a launch; what it raises is kept for `end`, since C is in between."""
        try:
            kernel = self._kernels[call.function - 1]
            assert call.threads == kernel.threads
            options = Options(
                races=self.races,
                dependent=bool(call.attributes.get(PROGRAMMATIC_STREAM_SERIALIZATION)),
                together=bool(call.attributes.get(COOPERATIVE)),
                max_steps=self.max_steps,
            )
            regions = [_region(name, tensor) for name, tensor in self._tensors]
            before = [replace(region, data=region.data.copy()) for region in regions if self.keep]
            inputs = kernel, call.grid, call.arguments(kernel.params)
            machine = launch(*inputs, GlobalMemory(regions), call.shared_bytes, options)
            replay = None
            if self.keep:
                after = [region.data.copy() for region in regions]
                replay = Replay(*inputs, call.shared_bytes, options, before, after)
            self.records.append(
                Record(
                    kernel, kernel.threads * math.prod(call.grid), machine.executed.total(),
                    machine.peak_register_bytes, call.attributes, replay,
                )
            )  # fmt: skip
            self.counts[f"{self.capability} {kernel.name}"] += 1
        except BaseException as error:
            self._error = error


def _region(name: str, tensor: Tensor) -> Region:
    """Return the bytes from a tensor's first element to its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    count = (last + 1) * tensor.element_size()
    data = (ctypes.c_uint8 * count).from_address(tensor.data_ptr())
    return Region(tensor.data_ptr(), np.frombuffer(data, np.uint8), name, tensor.element_size())
