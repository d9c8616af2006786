"""TensorRT's two packages: tensorrt-rtx compiles ahead of time, tensorrt on the device."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from vila_deploy.utils.errors import VilaDeployError

JETSON = "linux-aarch64"


@dataclass(frozen=True)
class Compiler:
    """A TensorRT package.

    Args:
        package: its name on PyPI and in the manifest's versions.
        module: its name when imported.
        import_package: imports it.
        ahead_of_time: CUDA compute capabilities that it compiles for without such a GPU; empty
            if it compiles on the device only.
        undocumented: those of them that NVIDIA's support tables leave out.
        install: how to install it.
        upgrade: how to get a newer version.
        min_versions: the oldest version that reads graphs of each dialect.
        group_sizes: group sizes of int4 weights that it takes.
    """

    package: str
    module: str
    import_package: Callable[[], ModuleType]
    ahead_of_time: tuple[str, ...]
    install: str
    upgrade: str
    min_versions: dict[str, tuple[int, int]]
    group_sizes: tuple[int, ...]
    undocumented: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        """Return whether the package is installed."""
        return find_spec(self.module) is not None

    def load(self) -> ModuleType:
        """Import and return the package.

        Raises:
            VilaDeployError: missing, or its libraries don't load.
        """
        try:
            return self.import_package()
        except Exception as error:  # a package without its libraries raises its own types
            first_line = str(error).partition("\n")[0]
            raise VilaDeployError(
                f"{self.package} can't be loaded ({first_line})", fix=self.install
            ) from error

    def check_dialect(self, dialect: str) -> str:
        """Return the package's version; raise VilaDeployError if it can't read `dialect`."""
        version = str(self.load().__version__)
        oldest = self.min_versions[dialect]
        if release(version) < oldest:
            raise VilaDeployError(
                f"{self.package} {version} is older than {oldest[0]}.{oldest[1]}, which graphs of "
                f"dialect {dialect} need",
                fix=self._upgrade(),
            )
        return version

    def _upgrade(self) -> str:
        # A package without ahead_of_time is used on the device itself.
        on_board = not self.ahead_of_time and host_platform() == JETSON
        return f"build with --jetpack 6, or {self.upgrade}" if on_board else self.upgrade


def _import_tensorrt() -> ModuleType:
    import tensorrt

    return tensorrt


def _import_tensorrt_rtx() -> ModuleType:
    import tensorrt_rtx

    return tensorrt_rtx


# tensorrt-rtx counts versions of its own: 1.7 has the operators of TensorRT 10.15 and later.
COMPILERS = {
    "tensorrt-rtx": Compiler(
        package="tensorrt-rtx",
        module="tensorrt_rtx",
        import_package=_import_tensorrt_rtx,
        ahead_of_time=("8.0", "8.6", "8.9", "12.0"),
        install="pip install tensorrt-rtx cuda-bindings",
        upgrade="pip install -U tensorrt-rtx",
        min_versions={"standard": (1, 7), "primitive": (1, 0)},
        # Compiled here, and the graphs compared with the reference.
        group_sizes=(16, 32, 64, 128),
        # Its tables of releases 1.0 to 1.5 and of the latest list 7.5, 8.6, 8.9, 12.0 and 12.1.
        undocumented=("8.0",),
    ),
    "tensorrt": Compiler(
        package="tensorrt",
        module="tensorrt",
        import_package=_import_tensorrt,
        ahead_of_time=(),
        install="on Jetson: sudo apt install nvidia-jetpack; elsewhere: pip install tensorrt",
        upgrade="install a newer TensorRT",
        min_versions={"standard": (10, 15), "primitive": (10, 3)},
        # From NVIDIA's documentation, "Working with Quantized Types".
        group_sizes=(64, 128),
    ),
}


def create(trt: Any, name: str, *arguments: Any) -> Any:
    """Return an object of TensorRT's class `name`.

    Raises:
        VilaDeployError: its library returns none, as one of another release than the driver does.
    """
    try:
        made = getattr(trt, name)(*arguments)
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise _not_created(trt, name, reason) from error
    if made is None:
        raise _not_created(trt, name, "it returns none")
    return made


def _not_created(trt: Any, name: str, reason: str) -> VilaDeployError:
    return VilaDeployError(
        f"TensorRT {trt.__version__} can't make its {name} ({reason})",
        fix="check that driver, CUDA and TensorRT are of the same release, and start a container "
        "with --runtime nvidia (Jetson) or --gpus all",
    )


def release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    numbers = version.split(".")
    return int(numbers[0]), int(numbers[1])


def host_platform() -> str:
    """Return this computer's platform in the spelling of engines/*.toml, e.g. "linux-x86_64"."""
    return f"{platform.system().lower()}-{platform.machine()}"


def compute_capability_member(trt: Any, capability: str) -> Any:
    """Return the package's constant of a compute capability, "8.9" → ComputeCapability.SM89."""
    return getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
