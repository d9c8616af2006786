"""Find trtllm-build and the GPU of this device, and run trtllm-build."""

from __future__ import annotations

import shutil

from vila_deploy.backends.tensorrt_llm.releases import Release
from vila_deploy.backends.tool_process import run_tool
from vila_deploy.utils.errors import VilaDeployError

BUILDER = "trtllm-build"
MEMORY_FIX = (
    "close other programs, add swap space, or build with a smaller --max-input-len, "
    "--max-seq-len or --max-batch-size"
)


def find_builder(release: Release) -> str:
    """Return the path of trtllm-build.

    Raises:
        VilaDeployError: it is not installed; the message says what to install.
    """
    path = shutil.which(BUILDER)
    if path is None:
        raise VilaDeployError(
            f"{BUILDER} is not here",
            fix=f"install TensorRT-LLM {release.title} ({release.install[0]}) on the device",
        )
    return path


def check_capability(expected: str, title: str) -> None:
    """Raise VilaDeployError if this computer's GPU has another CUDA compute capability."""
    import torch

    if not torch.cuda.is_available():
        raise VilaDeployError("no CUDA GPU is here", fix=f"run the same command on the {title}")
    actual = "{}.{}".format(*torch.cuda.get_device_capability())
    if actual != expected:
        raise VilaDeployError(
            f"this GPU has compute capability {actual}, the engine is for {expected}",
            fix=f"run the same command on the {title}, or choose another --target",
        )


def run_builder(command: list[str]) -> None:
    """Run trtllm-build and show its newest line as progress.

    Args:
        command: its paths must be absolute, since it runs in a temporary folder.

    Raises:
        VilaDeployError: it fails; the message quotes its error and names the full log.
    """
    run_tool(BUILDER, command, MEMORY_FIX)
