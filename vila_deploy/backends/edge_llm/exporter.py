"""Run NVIDIA's exporter, tensorrt-edgellm-export, on the checkpoint in an engine folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from vila_deploy.backends.edge_llm import files
from vila_deploy.backends.tool_process import run_tool
from vila_deploy.utils.errors import VilaDeployError

EXPORTER = "tensorrt-edgellm-export"
INSTALL = "pip install 'tensorrt-edgellm[export]==0.11.0'"
# Int4GroupwiseGemmPlugin, whose kernels take any shape in groups of 128; the second version's
# leave out projections whose sides are no multiples of 64.
PLUGIN_VERSION = 1
MEMORY_FIX = "close other programs, or export on a computer with more memory"


def find_exporter() -> str:
    """Return the path of the exporter.

    Raises:
        VilaDeployError: it is not installed; the message says what to install.
    """
    path = shutil.which(EXPORTER)
    if path is None:
        raise VilaDeployError(
            f"{EXPORTER} is not here",
            fix=f"install it into an environment of its own ({INSTALL}) and put that on PATH",
        )
    return path


def export(folder: Path) -> None:
    """Write exported/ from llm_checkpoint/; it appears whole or not at all.

    Raises:
        VilaDeployError: what the exporter says, in one line.
    """
    folder = folder.resolve()
    partial = folder / f"{files.EXPORTED}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = [find_exporter(), str(folder / files.CHECKPOINT), str(partial)]
    command.append(f"--int4-gemm-plugin-version={PLUGIN_VERSION}")
    run_tool(EXPORTER, command, MEMORY_FIX)
    missing = [
        name
        for name in (files.GRAPH, files.EMBEDDING)
        if not (partial / files.LLM / name).is_file()
    ]
    if missing:
        raise VilaDeployError(
            f"{EXPORTER} ended without writing {files.LLM}/{missing[0]}",
            where=folder,
            fix=f"run it by hand, as {files.INSTRUCTIONS} there says, to see why",
        )
    partial.rename(folder / files.EXPORTED)
