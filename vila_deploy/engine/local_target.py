"""Find the target that this computer is: its GPU if it has one, else its processor."""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vila_deploy.engine.target import Target, get_target, load_targets

AUTO, CPU = "auto", "cpu"
# A GPU reports a little less than it is sold with, a Jetson what its firmware leaves.
SAME_MEMORY = 1.15
SAME_CAPABILITY = (0, False, 0)
JETSON_MODEL = Path("/proc/device-tree/model")
JETSON_COMPUTE_CAPABILITY = "8.7"
QUERY = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class LocalDevice:
    """What runs engines on this computer; `compute_capability` and memory are None for a CPU."""

    title: str
    compute_capability: str | None = None
    memory_bytes: int | None = None
    jetson: bool = False


@dataclass(frozen=True)
class LocalTarget:
    """The target taken for this computer; `note` says so where it is only the nearest one."""

    target: Target
    device: LocalDevice
    note: str = ""


def local_target() -> LocalTarget:
    """Return the target of this computer's first GPU, or of its processor without one."""
    return nearest_target(find_device())


def target_name(name: str) -> tuple[str, str]:
    """Return the target for `--target NAME`, where "auto" is this computer, and a note or "".

    Raises:
        VilaDeployError: unknown; the message lists those there are.
    """
    if name.lower() != AUTO:
        return get_target(name).name, ""
    found = local_target()
    return found.target.name, found.note or f"this computer is target {found.target.name}"


def find_device() -> LocalDevice:
    """Return this computer's first GPU, as its driver describes it; its processor without one."""
    return _jetson() or _gpu_by_driver() or _gpu_by_torch() or LocalDevice("processor")


def nearest_target(device: LocalDevice) -> LocalTarget:
    """Return the target with the device's compute capability and memory, else the nearest one."""
    if device.compute_capability is None or device.memory_bytes is None:
        return LocalTarget(get_target(CPU), device)
    gpus = [target for target in load_targets().values() if _is_jetson(target) == device.jetson]
    distances = {
        target.name: (
            _capability_distance(device.compute_capability, target.compute_capability),
            abs(math.log(device.memory_bytes / target.memory_bytes)),
        )
        for target in gpus
        if target.compute_capability and target.memory_bytes
    }
    target = get_target(min(distances, key=lambda name: distances[name]))
    capability, memory = distances[target.name]
    if capability == SAME_CAPABILITY and memory <= math.log(SAME_MEMORY):
        return LocalTarget(target, device)
    note = (
        f"{device.title} (compute capability {device.compute_capability}, "
        f"{device.memory_bytes / 2**30:.0f} GiB) has no row in engines/: taken as the nearest, "
        f"{target.name} ({target.title})"
    )
    return LocalTarget(target, device, note)


def _is_jetson(target: Target) -> bool:
    return bool(target.tensorrt and target.tensorrt.jetpacks)


def _capability_distance(device: str, target: str) -> tuple[int, bool, int]:
    """Order targets by generation; code for an older one of it runs, code for a newer does not."""
    here, there = (tuple(map(int, capability.split("."))) for capability in (device, target))
    return abs(here[0] - there[0]), there > here, abs(here[1] - there[1])


def _jetson() -> LocalDevice | None:
    """Boards of the Orin family share GPU and system memory."""
    try:
        model = JETSON_MODEL.read_text("ascii", "replace").strip("\0\n ")
    except OSError:
        return None
    if "Orin" not in model:
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return LocalDevice(model, JETSON_COMPUTE_CAPABILITY, memory, jetson=True)


def _gpu_by_driver() -> LocalDevice | None:
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=30, check=True)
        name, capability, mebibytes = done.stdout.splitlines()[0].rsplit(", ", 2)
        return LocalDevice(name, capability, int(mebibytes) << 20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _gpu_by_torch() -> LocalDevice | None:
    """In a container without nvidia-smi the device file is still there."""
    if not Path("/dev/nvidiactl").exists():
        return None
    try:
        import torch

        properties = torch.cuda.get_device_properties(0)
    except (ImportError, RuntimeError, AssertionError):
        return None
    capability = f"{properties.major}.{properties.minor}"
    return LocalDevice(properties.name, capability, properties.total_memory)
