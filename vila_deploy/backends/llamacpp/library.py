"""llama.cpp through llama-cpp-python: its C API, its log, the devices that it was built for."""

from __future__ import annotations

import ctypes
import re
from collections import deque
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vila_deploy.backends.llamacpp.memory import gpu_kind
from vila_deploy.engine.target import Target
from vila_deploy.utils.errors import VilaDeployError, short

PACKAGE = "llama-cpp-python"
LEAST_VERSION = "0.3.36"
INSTALL = f"pip install '{PACKAGE}>={LEAST_VERSION}'"
# What this backend calls and sets beyond what every release has.
FUNCTIONS = ("llama_get_memory", "llama_memory_seq_rm", "llama_memory_seq_cp", "llama_model_size")
CONTEXT_FIELDS = ("flash_attn_type", "kv_unified", "n_outputs_max", "op_offload")
# How each kind of GPU is asked for when llama.cpp is compiled, by ggml's name of the kind.
CMAKE_FLAGS = {"CUDA": "GGML_CUDA", "MTL": "GGML_METAL", "Vulkan": "GGML_VULKAN"}
TITLES = {"MTL": "Metal"}
# ggml_backend_dev_type: a GPU with memory of its own, one that shares the host's.
GPU_TYPES = (1, 2)
# ggml_log_level: warnings and errors.
LEAST_LEVEL, CONTINUED = 3, 5
LOG_LINES = 200


@dataclass(frozen=True)
class GpuDevice:
    """A GPU as ggml sees it.

    Args:
        kind: ggml's name of the library that drives it, e.g. "Vulkan".
        handle: ggml_backend_dev_t.
    """

    kind: str
    title: str
    free_bytes: int
    handle: int


class Log:
    """The last lines that llama.cpp wrote, for messages; nothing is printed."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=LOG_LINES)
        self.problems: deque[str] = deque(maxlen=LOG_LINES)
        self._level = 0

    def write(self, level: int, text: bytes, _: Any) -> None:
        """Take a line or a part of one; ggml_log_callback."""
        self._level = self._level if level == CONTINUED else level
        line = text.decode("utf-8", "replace").strip()
        if line:
            self.lines.append(line)
            if self._level >= LEAST_LEVEL:
                self.problems.append(line)

    def last_problem(self) -> str:
        """Return the newest warning or error in brackets, or nothing."""
        return f" ({short(self.problems[-1])})" if self.problems else ""


LOG = Log()


@cache
def load_library() -> Any:
    """Return the package llama_cpp, silent and ready.

    Raises:
        VilaDeployError: it is not installed, too old, or can't be loaded.
    """
    try:
        installed = version(PACKAGE)
    except PackageNotFoundError as error:
        raise VilaDeployError(
            f"backend llamacpp needs {PACKAGE}, which is not installed",
            fix=f"{INSTALL}; docs/llamacpp.md says how to compile it for a GPU",
        ) from error
    too_old = VilaDeployError(
        f"{PACKAGE} {installed} is too old for backend llamacpp", fix=f"{INSTALL} --upgrade"
    )
    if _numbers(installed) < _numbers(LEAST_VERSION):
        raise too_old
    try:
        import llama_cpp
    except Exception as error:  # the package raises what its search for libraries gives
        first_line = str(error).partition("\n")[0]
        raise VilaDeployError(
            f"{PACKAGE} {installed} can't be loaded ({first_line})",
            fix=f"install it again: {INSTALL} --force-reinstall --no-cache-dir",
        ) from error
    fields = {name for name, *_ in llama_cpp.llama_context_params._fields_}
    if not fields.issuperset(CONTEXT_FIELDS) or not all(hasattr(llama_cpp, f) for f in FUNCTIONS):
        raise too_old
    LOG.callback = llama_cpp.llama_log_callback(LOG.write)  # type: ignore[attr-defined]
    llama_cpp.llama_log_set(LOG.callback, ctypes.c_void_p(0))  # type: ignore[attr-defined]
    llama_cpp.llama_backend_init()
    return llama_cpp


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def find_gpu(target: Target) -> GpuDevice | None:
    """Return the first GPU here that is of the target's kind; None if the target has none.

    Raises:
        VilaDeployError: the library wasn't compiled for such GPUs, or finds none.
    """
    kind = gpu_kind(target)
    if kind is None:
        return None
    library = load_library()
    title = TITLES.get(kind, kind)
    kinds = compiled_kinds(library)
    if kind not in kinds:
        raise VilaDeployError(
            f"{PACKAGE} {library.__version__} was compiled for {', '.join(kinds)}, not for {title}",
            where=f"target {target.name}",
            fix=f"CMAKE_ARGS=-D{CMAKE_FLAGS[kind]}=on {INSTALL} --force-reinstall --no-cache-dir, "
            "or build the engine for target cpu",
        )
    found = [device for device in gpus(library) if device.kind == kind]
    if not found:
        raise VilaDeployError(
            f"llama.cpp finds no GPU that {title} can use here{LOG.last_problem()}",
            where=f"target {target.name}",
            fix="check its driver, or build the engine for target cpu",
        )
    return found[0]


def compiled_kinds(library: Any) -> list[str]:
    """Return ggml's names of the kinds of devices that the library was compiled for."""
    ggml = _ggml(library)
    registries = map(ggml.ggml_backend_reg_get, range(ggml.ggml_backend_reg_count()))
    return [ggml.ggml_backend_reg_name(each).decode() for each in registries]


def gpus(library: Any) -> list[GpuDevice]:
    """Return the GPUs of this computer that the library can use."""
    ggml = _ggml(library)
    found = []
    for device in map(ggml.ggml_backend_dev_get, range(ggml.ggml_backend_dev_count())):
        if ggml.ggml_backend_dev_type(device) not in GPU_TYPES:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        kind = ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(device)).decode()
        title = ggml.ggml_backend_dev_description(device).decode("utf-8", "replace")
        found.append(GpuDevice(kind, title, free.value or total.value, device))
    return found


def _ggml(library: Any) -> Any:
    """Return ggml's functions about devices, which the package doesn't declare."""
    ggml = library.llama_cpp._lib
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    declared = {
        "ggml_backend_reg_count": (number,),
        "ggml_backend_reg_get": (pointer, number),
        "ggml_backend_reg_name": (text, pointer),
        "ggml_backend_dev_count": (number,),
        "ggml_backend_dev_get": (pointer, number),
        "ggml_backend_dev_type": (ctypes.c_int, pointer),
        "ggml_backend_dev_description": (text, pointer),
        "ggml_backend_dev_backend_reg": (pointer, pointer),
        "ggml_backend_dev_memory": (None, pointer, pointer, pointer),
    }
    for name, (result, *arguments) in declared.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    return ggml
