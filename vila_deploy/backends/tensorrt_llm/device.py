"""Find trtllm-build and the GPU of this device, and run trtllm-build."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from pathlib import Path

from vila_deploy.backends.tensorrt_llm.releases import Release
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import progress

BUILDER = "trtllm-build"
ERROR_LINE = re.compile(r"error|\[E\]|exception|out of memory|required but not provided", re.I)
# Date, program and level of a log line.
PREFIX = re.compile(r"^(\[[^\]]*\]\s*)+")
MEMORY_FIX = (
    "close other programs, add swap space, or build with a smaller --max-input-len, "
    "--max-seq-len or --max-batch-size"
)
MAX_LOG_LINES = 400


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
    log = tempfile.NamedTemporaryFile(  # noqa: SIM115  outlives this function on failure
        "w", prefix="trtllm-build-", suffix=".log", delete=False, encoding="utf-8"
    )
    lines: deque[str] = deque(maxlen=MAX_LOG_LINES)
    # trtllm-build writes its timing cache into the working directory.
    with progress(1, BUILDER) as advance, log, tempfile.TemporaryDirectory() as scratch:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=scratch,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    lines.append(PREFIX.sub("", line.strip()))
                    advance(lines[-1][:80], steps=0)
                code = process.wait()
            finally:
                process.kill()
        if code == 0:
            advance("done")
    if code:
        raise _failure(code, lines, Path(log.name))
    os.unlink(log.name)  # noqa: PTH108


def _failure(code: int, lines: deque[str], log: Path) -> VilaDeployError:
    if code == -signal.SIGKILL:
        return VilaDeployError(
            f"{BUILDER} was killed, as Linux does when memory runs out", fix=MEMORY_FIX
        )
    message = next((line for line in reversed(lines) if ERROR_LINE.search(line)), "")
    message = message or next((line for line in reversed(lines) if line), "no output")
    memory = re.search(r"out of memory|outofmemory|cannot allocate", message, re.I)
    return VilaDeployError(
        f"{BUILDER} failed ({message[:200]})",
        fix=MEMORY_FIX if memory else f"see {log}, then run the same command again",
    )
