"""Triton's driver, launcher and C code, with the emulated GPU in place of a real one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.emulator.device import EmulatedDevice
from tests.support.emulator.libcuda import load_library, on_launch

# As of an H200; only limits of shared memory and registers are looked at.
PROPERTIES = {
    "max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32,
    "sm_clock_rate": 1980000, "mem_clock_rate": 3201000, "mem_bus_width": 6144,
}  # fmt: skip
MAX_THREADS = 1024


def install(device: EmulatedDevice) -> None:
    """Make the device Triton's active one, for good; needs a process without TRITON_INTERPRET.

    Triton's own driver, launcher and their C code are used; of libcuda there is a stand-in.
    """
    load_library()
    from triton import knobs
    from triton.runtime import driver

    loading: list[str] = []

    def remember(module: Any, function: Any, name: str, files: dict[str, str], hash: str) -> None:
        (path,) = (path for file, path in files.items() if file.endswith(".ptx"))
        loading.append(Path(path).read_text("utf-8"))

    knobs.runtime.kernel_load_start_hook.add(remember)
    driver.set_active(_make_driver(device, loading))
    # As long as launches may come, C must find it.
    device.callback = on_launch(device.execute)


def _make_driver(device: EmulatedDevice, loading: list[str]) -> Any:
    """Return Triton's CUDA driver for the device.

    Args:
        loading: the PTX of the kernel that Triton is about to load.
    """
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), _launcher_class(device)
            self.utils.load_binary = self._load
            self.utils.get_device_properties = lambda number: PROPERTIES
            self.get_device_capability = lambda number: divmod(number, 10)

        def _load(self, name: str, binary: bytes, *_: Any) -> tuple[int, int, int, int, int]:
            number = device.add_kernel(loading.pop())
            return number, number, 64, 0, MAX_THREADS

        def get_current_device(self) -> int:
            # Triton keeps compiled kernels by this number: each capability is a device.
            return device.capability.sm

        def set_current_device(self, number: int) -> None:
            pass

        def get_current_stream(self, number: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return Driver()


def _launcher_class(device: EmulatedDevice) -> type:
    """Return Triton's launcher, which also tells the device what tensors are meant."""
    from triton.backends.nvidia import driver as nvidia

    class Launcher(nvidia.CudaLauncher):  # type: ignore[misc]
        def __init__(self, source: Any, metadata: Any):
            super().__init__(source, metadata)
            self._names = source.fn.arg_names

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            run = functools.partial(self._run, x, y, z, stream, function, *rest)
            if device.capturing is None:
                run()
            else:
                device.capturing.append(run)

        def _run(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            # Ahead of the kernel's own arguments are metadata and hooks.
            arguments = rest[len(rest) - len(self._names) :]
            pairs = zip(self._names, arguments, strict=True)
            device.begin([found for name, value in pairs for found in _tensors(name, value)])
            super().__call__(x, y, z, stream, function, *rest)
            device.end()

    return Launcher


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.numel():
            yield name, value
    elif isinstance(value, tuple):
        for index, element in enumerate(value):
            yield from _tensors(f"{name}.{index}", element)
