"""Call the CUDA runtime, as far as running an engine needs it, and check every result."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_deploy.utils.errors import VilaDeployError

INSTALL = "pip install cuda-bindings, of the CUDA release that the driver supports"
# From 12.9 on cuda-bindings include a CUDA runtime, for which the driver must be new enough.
IN_CONTAINER = "start a container with --runtime nvidia (Jetson) or --gpus all"
DRIVER_FIX = (
    "update the driver, or pip install cuda-bindings of its release (JetPack 6: 12.8.0); "
    f"{IN_CONTAINER}"
)
NO_DRIVER_FIX = f"check the driver with nvidia-smi; {IN_CONTAINER}"


def runtime() -> ModuleType:
    """Import and return the CUDA runtime's Python module.

    Raises:
        VilaDeployError: not installed.
    """
    try:
        from cuda.bindings import runtime as module
    except ImportError as error:
        raise VilaDeployError("the package cuda-bindings is not here", fix=INSTALL) from error
    except RuntimeError as error:
        raise _no_driver(error) from error
    return module


def call(function: str, *arguments: Any) -> Any:
    """Call the CUDA runtime; return its one result, a tuple of several, or None.

    Raises:
        VilaDeployError: CUDA reports an error.
    """
    cuda = runtime()
    try:
        error, *results = getattr(cuda, function)(*arguments)
    except RuntimeError as problem:
        raise _no_driver(problem) from problem
    if error != cuda.cudaError_t.cudaSuccess:
        _, text = cuda.cudaGetErrorString(error)
        reason = text.decode() if isinstance(text, bytes) else str(error)
        old_driver = error == getattr(cuda.cudaError_t, "cudaErrorInsufficientDriver", None)
        raise VilaDeployError(
            f"CUDA can't do {function} ({reason})",
            fix=DRIVER_FIX if old_driver else "check the driver with nvidia-smi",
        )
    return results[0] if len(results) == 1 else tuple(results) or None


def _no_driver(error: RuntimeError) -> VilaDeployError:
    """Return the error for a missing libcuda, at which cuda-bindings up to 12.8 raise."""
    first_line = str(error).partition("\n")[0]
    return VilaDeployError(f"CUDA's driver can't be loaded ({first_line})", fix=NO_DRIVER_FIX)


def compute_capability() -> str:
    """Return the compute capability of the first GPU, e.g. "8.7"."""
    names = runtime().cudaDeviceAttr
    major = call("cudaDeviceGetAttribute", names.cudaDevAttrComputeCapabilityMajor, 0)
    minor = call("cudaDeviceGetAttribute", names.cudaDevAttrComputeCapabilityMinor, 0)
    return f"{major}.{minor}"


class Stream:
    """A CUDA stream, and copies and graph captures on it."""

    def __init__(self) -> None:
        self.handle = call("cudaStreamCreate")

    def __int__(self) -> int:
        return int(self.handle)

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        call("cudaStreamSynchronize", self.handle)

    def upload(self, destination: Buffer, source: NDArray[Any]) -> None:
        """Copy host to device; `source` must live until the stream is synchronized."""
        self._copy(destination.address, source.ctypes.data, source.nbytes, "HostToDevice")

    def download(self, destination: NDArray[Any], source: Buffer) -> None:
        """Copy device to host; `destination` is valid once the stream is synchronized."""
        size = destination.nbytes
        self._copy(destination.ctypes.data, source.address, size, "DeviceToHost")

    def copy_rows(
        self, destination: int, pitch: int, source: int, width_bytes: int, rows: int
    ) -> None:
        """Copy contiguous rows of `width_bytes` to rows `pitch` bytes apart."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        arguments = (destination, pitch, source, width_bytes, width_bytes, rows, kind, self.handle)
        call("cudaMemcpy2DAsync", *arguments)

    def _copy(self, destination: int, source: int, size_bytes: int, kind: str) -> None:
        direction = getattr(runtime().cudaMemcpyKind, f"cudaMemcpy{kind}")
        call("cudaMemcpyAsync", destination, source, size_bytes, direction, self.handle)

    def zero(self, buffer: Buffer) -> None:
        """Fill `buffer` with zeros."""
        call("cudaMemsetAsync", buffer.address, 0, buffer.size_bytes, self.handle)

    def begin_capture(self) -> None:
        """Record the work that follows as a CUDA graph, without running it."""
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)

    def end_capture(self) -> Any:
        """Return the work since `begin_capture` as a graph that `launch` runs."""
        graph = call("cudaStreamEndCapture", self.handle)
        try:
            return call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def abandon_capture(self) -> None:
        """End a capture in which something failed: until then the stream takes no other work."""
        with suppress(VilaDeployError):
            call("cudaGraphDestroy", call("cudaStreamEndCapture", self.handle))

    def launch(self, executable: Any) -> None:
        """Run a captured graph."""
        call("cudaGraphLaunch", executable, self.handle)

    def destroy(self, executable: Any) -> None:
        """Free a captured graph."""
        call("cudaGraphExecDestroy", executable)

    def close(self) -> None:
        call("cudaStreamDestroy", self.handle)


class Buffer:
    """A block of GPU memory."""

    def __init__(self, size_bytes: int):
        self.size_bytes = size_bytes
        self.address = int(call("cudaMalloc", size_bytes))

    def close(self) -> None:
        call("cudaFree", self.address)


class Pinned:
    """Page-locked host memory, as `array`: copies from other memory don't overlap with kernels."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]):
        count = int(np.prod(shape))
        size_bytes = max(1, count * np.dtype(dtype).itemsize)
        self._address = int(call("cudaMallocHost", size_bytes))
        raw = (ctypes.c_byte * size_bytes).from_address(self._address)
        self.array: NDArray[Any] = np.frombuffer(memoryview(raw), dtype, count).reshape(shape)

    def close(self) -> None:
        self.array = np.empty(0)
        call("cudaFreeHost", self._address)
