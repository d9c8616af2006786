"""Load and run ONNX graphs on the CPU with onnxruntime."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

ERRORS_ONLY = 3
NO_PREPACKING = {"session.disable_prepacking": "1"}
PARALLEL_PREPACKING = {"session.prepack.enable_parallel": "1"}
# A slower kernel for int8 products, whose sums of two do not overflow 16 bits.
NO_OVERFLOW = {"session.x64quantprecision": "1"}
CPU_INFO = Path("/proc/cpuinfo")
VNNI = ("avx512_vnni", "avx_vnni")


def load_graph(
    path: Path, *, threads: int = 0, options: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """Load an ONNX graph for the CPU.

    Args:
        threads: threads of one operator; 0 leaves the choice to onnxruntime.
        options: onnxruntime's configuration entries of a session.

    Raises:
        VilaDeployError: onnxruntime can't load it.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    settings.intra_op_num_threads = threads
    for key, value in {**PARALLEL_PREPACKING, **(options or {})}.items():
        settings.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types derive from Exception only
        first_line = str(error).partition("\n")[0]
        raise VilaDeployError(
            f"onnxruntime {onnxruntime.__version__} can't load it ({first_line})",
            where=path,
            fix="build the engine again with this version",
        ) from error


def vision_options() -> Mapping[str, str]:
    """Return onnxruntime's options for a vision graph: x86 without VNNI has to avoid overflow."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    flags = CPU_INFO.read_text("ascii", "replace").split() if CPU_INFO.exists() else []
    return {} if any(name in flags for name in VNNI) else NO_OVERFLOW


def run_each(session: onnxruntime.InferenceSession, batch: Floats) -> Floats:
    """Return the only output of a graph for each item of a batch of its only input.

    Items go through one by one, so that memory holds the activations of one; it is given back.
    """
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    outputs = [
        session.run([target.name], {source.name: np.ascontiguousarray(item[None])}, options)[0]
        for item in batch
    ]
    return np.concatenate(outputs)
