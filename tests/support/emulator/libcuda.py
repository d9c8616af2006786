"""The stand-in for libcuda, compiled once, and what a launch hands to it."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda.c")
# Of CUDA's driver API: CUlaunchAttribute is 72 bytes, its value begins behind 8.
ATTRIBUTE_BYTES, VALUE_AT = 72, 8
COOPERATIVE, PROGRAMMATIC_STREAM_SERIALIZATION = 2, 6
PARAMETER_BYTES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "s32": 4}


class Config(ctypes.Structure):
    """CUlaunchConfig of CUDA's driver API."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


@dataclass(frozen=True)
class LaunchCall:
    """What a call of cuLaunchKernelEx says.

    Args:
        function: number that the loader gave to the kernel.
        attributes: identifier → value.
        parameters: addresses of the arguments.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    attributes: dict[int, int]
    parameters: Any

    def arguments(self, params: list[tuple[str, str]]) -> dict[str, bytes]:
        """Return the raw bytes of each parameter (type, name)."""
        return {
            name: ctypes.string_at(self.parameters[index], PARAMETER_BYTES[kind])
            for index, (kind, name) in enumerate(params)
        }


@functools.cache
def load_library() -> ctypes.CDLL:
    """Compile the stand-in, load it for all, and point Triton to it.

    Raises:
        RuntimeError: no C compiler is installed; Triton itself needs one to launch a kernel.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("the emulator and Triton's launcher need a C compiler: install gcc")
    folder = Path(tempfile.mkdtemp(prefix="emulated-libcuda-"))
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run([compiler, *options, "-o", library, SOURCE], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # By its name Triton's own modules then find it.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def on_launch(function: Callable[[LaunchCall], None]) -> Any:
    """Let every launch call `function`; return what must be kept as long as launches come."""

    def call(config_address: int, number: int, parameters: int) -> None:
        config = ctypes.cast(config_address, ctypes.POINTER(Config)).contents
        assert config.block_y == config.block_z == 1
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        grid = (config.grid_x, config.grid_y, config.grid_z)
        attributes = _attributes(config.attributes, config.attribute_count)
        function(
            LaunchCall(number, grid, config.block_x, config.shared_bytes, attributes, pointers)
        )

    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)(call)
    load_library().emulator_set_callback(callback)
    return callback


def _attributes(address: int, count: int) -> dict[int, int]:
    found = {}
    for index in range(count):
        raw = ctypes.string_at(address + ATTRIBUTE_BYTES * index, ATTRIBUTE_BYTES)
        identifier = int.from_bytes(raw[:4], "little")
        found[identifier] = int.from_bytes(raw[VALUE_AT : VALUE_AT + 4], "little")
    return found
