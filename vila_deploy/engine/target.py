"""Targets: the boards and GPUs that engines are built for, one TOML file each in engines/."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from typing import Any

from vila_deploy.utils.errors import VilaDeployError

try:
    import tomllib
except ModuleNotFoundError:  # JetPack 6 has Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]


@dataclass(frozen=True)
class TensorRt:
    """How TensorRT engines are made for a device.

    Args:
        package: "tensorrt-rtx", which compiles on any computer, or "tensorrt", on the device.
        dialect: of the graphs that it reads there.
        jetpacks: on Jetson, the dialect by JetPack release; the first is what is built unless
            `--jetpack` says otherwise.
        contiguous_bytes: of memory in one piece that the device's kernel has for compiling; None
            where pieces of any size are to be had.
    """

    package: str
    dialect: str
    jetpacks: dict[str, str] = field(default_factory=dict)
    contiguous_bytes: int | None = None

    def dialect_of(self, jetpack: str | None) -> str:
        return self.dialect if jetpack is None else self.jetpacks[jetpack]


@dataclass(frozen=True)
class Target:
    """A device that engines are built for.

    Args:
        name: file name in engines/ without `.toml`; what `--target` takes.
        title: the device's full name.
        compute_capability: CUDA's, e.g. "8.7"; None for a CPU.
        memory_bytes: memory of the device; None means this host's.
        reserved_bytes: what the system takes of it where it is the only memory (estimate).
        bandwidth_bytes_per_s: published DRAM bandwidth; None means to be measured.
        host: platform that the engine runs on, e.g. "linux-aarch64"; "any" for a CPU.
        default_backend: built unless `--backend` says otherwise.
        backends: every backend that can serve it, with what it needs there.
        tensorrt: how backend tensorrt makes its engines, where there is one.
        ggml_backend: ggml's name of what drives its GPU, for backend llamacpp; None means CUDA, or
            nothing for a CPU.
    """

    name: str
    title: str
    compute_capability: str | None
    memory_bytes: int | None
    bandwidth_bytes_per_s: float | None
    host: str
    default_backend: str
    backends: dict[str, str]
    reserved_bytes: int | None = None
    tensorrt: TensorRt | None = None
    ggml_backend: str | None = None

    @property
    def is_one_device(self) -> bool:
        """Return whether its memory is known: its own, or this host's for a CPU."""
        return self.memory_bytes is not None or self.ggml_backend is None

    @property
    def usable_bytes(self) -> int | None:
        """Memory that an engine may fill, in bytes; None means what this host has to spare."""
        return self.memory_bytes and self.memory_bytes - (self.reserved_bytes or 0)


@cache
def load_targets() -> dict[str, Target]:
    """Return every target by name, from the installed engines/*.toml."""
    targets = {}
    for file in resources.files("vila_deploy.engines").iterdir():
        if file.name.endswith(".toml"):
            name = file.name.removesuffix(".toml")
            targets[name] = _target(name, tomllib.loads(file.read_text("utf-8")))
    return dict(sorted(targets.items()))


def get_target(name: str) -> Target:
    """Return the target called `name`, in any case and with or without dashes.

    Raises:
        VilaDeployError: unknown; the message lists those there are.
    """
    targets = load_targets()
    if name not in targets:
        for known, target in targets.items():
            if _letters(known) == _letters(name):
                return target
        raise VilaDeployError(
            f"unknown target {name!r}",
            fix=f"choose from {', '.join(targets)}; for another GPU copy the file in engines/ "
            "with its compute capability and change title, memory and bandwidth",
        )
    return targets[name]


def _letters(name: str) -> str:
    """Return the letters and digits of `name`, as its device is called whoever writes it."""
    return re.sub(r"[\W_]", "", name.lower())


def _target(name: str, row: dict[str, Any]) -> Target:
    known = {field.name for field in fields(Target)} - {"name"}
    optional = {
        "compute_capability", "memory_bytes", "bandwidth_bytes_per_s", "reserved_bytes", "tensorrt",
        "ggml_backend",
    }  # fmt: skip
    unknown, missing = row.keys() - known, known - optional - row.keys()
    if unknown or missing:
        raise VilaDeployError(
            f"unknown keys {sorted(unknown)}, missing keys {sorted(missing)}",
            where=f"engines/{name}.toml",
        )
    if row["default_backend"] not in row["backends"]:
        raise VilaDeployError("default_backend is not in backends", where=f"engines/{name}.toml")
    values: dict[str, Any] = {key: row.get(key) for key in known}
    if "tensorrt" in row:
        values["tensorrt"] = TensorRt(**row["tensorrt"])
    return Target(name=name, **values)
