"""A stand-in for what the project uses of torch.cuda, over the emulated GPU.

Tensors "on" the GPU lie in host memory. A captured graph replays launches of kernels and torch's
own operations, in their order.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.support.emulator.captured_operations import CapturedOperations
from tests.support.emulator.device import EmulatedDevice

MEMORY_BYTES = 139 << 30
USED_BYTES = 1 << 30
ALIGNMENT = 64  # of tensors, on the host that stands in
PROPERTIES = SimpleNamespace(
    L2_cache_size=1 << 16, multi_processor_count=132, total_memory=MEMORY_BYTES
)


class Event:
    """A time of the host."""

    def __init__(self, enable_timing: bool = False):
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds until `end`, never 0."""
        return max((end._time - self._time) * 1e3, 1e-3)


class Graph:
    """Launches and operations in the order in which they were captured."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        # In which tensors of either kind may be changed.
        with torch.inference_mode():
            for launch in self.launches:
                launch()

    def reset(self) -> None:
        self.launches.clear()


class OnHost(TorchFunctionMode):
    """Lets every tensor that is meant for the GPU be made and kept in host memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _host(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            found = func(*map(_host, args), **kwargs)
            # CUDA's memory is aligned; a tensor in a file that is mapped need not be.
            return found.clone() if found.data_ptr() % ALIGNMENT else found
        return func(*args, **kwargs)


def _host(value: Any) -> Any:
    named = isinstance(value, str) and value.split(":")[0] == "cuda"
    return "cpu" if named or (isinstance(value, torch.device) and value.type == "cuda") else value


def install_torch_cuda(device: EmulatedDevice) -> None:
    """Let this process's torch find the device, for good."""

    @contextlib.contextmanager
    def capture(graph: Graph, **_: Any) -> Iterator[None]:
        device.capturing = graph.launches
        try:
            with CapturedOperations(graph.launches):
                yield
        finally:
            device.capturing = None

    def nothing(*_: Any) -> None:
        pass

    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.get_device_capability = lambda *_: tuple(device.capability)
    cuda.get_device_name = lambda *_: f"emulated {device.capability}"
    cuda.get_device_properties = lambda *_: PROPERTIES
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: USED_BYTES
    cuda.mem_get_info = lambda *_: (MEMORY_BYTES - USED_BYTES, MEMORY_BYTES)
    cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0, synchronize=nothing)
    cuda.synchronize = cuda.empty_cache = cuda.reset_peak_memory_stats = nothing
    cuda.set_per_process_memory_fraction = nothing
    cuda.Event, cuda.CUDAGraph, cuda.graph = Event, Graph, capture
    cuda.graph_pool_handle = object
    torch.version.cuda = "13.0"
    move = torch.nn.Module.to

    def module_to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        named = {name: _host(value) for name, value in kwargs.items()}
        return move(self, *map(_host, args), **named)

    torch.nn.Module.to = module_to  # type: ignore[method-assign,assignment]
    OnHost().__enter__()
    _enter_in_threads()


def _enter_in_threads() -> None:
    """Let threads that begin from now on find the device too: modes belong to a thread."""
    run = threading.Thread.run

    def with_device(self: threading.Thread) -> None:
        with OnHost():
            run(self)

    threading.Thread.run = with_device  # type: ignore[method-assign]
