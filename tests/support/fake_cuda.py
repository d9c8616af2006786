"""A CUDA runtime in host memory, for any Python with numpy.

Addresses are real, freshly allocated memory holds NaN as a GPU's may, a captured graph runs when it
is launched and not before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray


class FakeCuda:
    """The calls of cuda.bindings.runtime that the project makes; every call is synchronous."""

    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorInsufficientDriver=35)
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=0)

    def __init__(self, capability: str):
        self.capability = capability
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.recorded: list[Callable[[], None]] | None = None
        self.launches = 0
        self.graphs = 0
        # Result of cudaDeviceGetAttribute.
        self.error = 0

    def cudaDeviceGetAttribute(self, which: int, device: int) -> tuple[int, int]:
        return self.error, int(self.capability.split(".")[which])

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"CUDA driver version is insufficient for CUDA runtime version"

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        memory = np.full(size, 0xFF, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    cudaStreamDestroy = cudaStreamSynchronize

    def cudaMemcpyAsync(self, to: int, source: int, size: int, *rest: Any) -> tuple[int]:
        assert self.recorded is None
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaMemcpy2DAsync(
        self, to: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, *_: Any
    ) -> tuple[int]:
        assert width <= pitch
        for row in range(rows):
            ctypes.memmove(to + row * pitch, source + row * source_pitch, width)
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[int]:
        ctypes.memset(address, value, size)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.recorded = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        assert self.recorded is not None
        recorded, self.recorded = self.recorded, None
        return 0, recorded

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        self.graphs += 1
        return 0, graph

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[int]:
        self.graphs -= 1
        return (0,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (0,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        self.launches += 1
        for call in graph:
            call()
        return (0,)
