"""TensorRT in its two forms: tensorrt-rtx compiles for other GPUs, tensorrt on the device."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from vila_deploy.utils.errors import VilaDeployError

JETSON = "linux-aarch64"


@dataclass(frozen=True)
class Compiler:
    """A TensorRT package.

    Args:
        package: what is imported, and what the manifest's versions call it.
        ahead_of_time: CUDA compute capabilities that it compiles for without such a GPU; empty
            where it compiles on the device only.
        install: what to do where it is missing.
        upgrade: what to do where it is too old.
        least: the oldest version that reads graphs of each dialect.
        group_sizes: of blocked int4 weights.
    """

    package: str
    module: str
    ahead_of_time: tuple[str, ...]
    install: str
    upgrade: str
    least: dict[str, tuple[int, int]]
    group_sizes: tuple[int, ...]

    @property
    def present(self) -> bool:
        return find_spec(self.module) is not None

    def load(self) -> ModuleType:
        """The imported package.

        Raises:
            VilaDeployError: missing, or its libraries don't load.
        """
        try:
            return import_module(self.module)
        except Exception as error:  # a package without its libraries raises its own types
            first_line = str(error).partition("\n")[0]
            raise VilaDeployError(
                f"{self.package} can't be loaded ({first_line})", fix=self.install
            ) from error

    def check_dialect(self, dialect: str) -> str:
        """The package's version, if it reads `dialect`; raises VilaDeployError otherwise."""
        version = str(self.load().__version__)
        least = self.least[dialect]
        if release(version) < least:
            raise VilaDeployError(
                f"{self.package} {version} is older than {least[0]}.{least[1]}, which graphs of "
                f"dialect {dialect} need",
                fix=self._upgrade(),
            )
        return version

    def _upgrade(self) -> str:
        # What compiles on the device only is asked there.
        on_board = not self.ahead_of_time and host_platform() == JETSON
        return f"build with --jetpack 6, or {self.upgrade}" if on_board else self.upgrade


# RTX counts versions of its own: 1.7 has the operators of TensorRT 10.15 and later.
COMPILERS = {
    "tensorrt-rtx": Compiler(
        package="tensorrt-rtx",
        module="tensorrt_rtx",
        ahead_of_time=("8.0", "8.6", "8.9", "12.0"),
        install="pip install tensorrt-rtx cuda-bindings",
        upgrade="pip install -U tensorrt-rtx",
        least={"standard": (1, 7), "primitive": (1, 0)},
        # Compiled and compared.
        group_sizes=(16, 32, 64, 128),
    ),
    "tensorrt": Compiler(
        package="tensorrt",
        module="tensorrt",
        ahead_of_time=(),
        install="on Jetson: sudo apt install nvidia-jetpack; elsewhere: pip install tensorrt",
        upgrade="install a newer TensorRT",
        least={"standard": (10, 15), "primitive": (10, 3)},
        # NVIDIA's documentation of its quantized types.
        group_sizes=(64, 128),
    ),
}


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    numbers = version.split(".")
    return int(numbers[0]), int(numbers[1])


def host_platform() -> str:
    """This computer as the targets spell it, e.g. "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine()}"


def compute_capability_member(trt: Any, capability: str) -> Any:
    """The package's own name of a compute capability, "8.9" → ComputeCapability.SM89."""
    return getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
