"""What is on this device: trtllm-build, its GPU; and running the former."""

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
TROUBLE = re.compile(r"error|\[E\]|exception|out of memory|required but not provided", re.I)
PREFIX = re.compile(r"^(\[[^\]]*\]\s*)+")  # date, program and level of a line
MEMORY_FIX = (
    "close other programs, add swap space, or build with a smaller --max-input-len, "
    "--max-seq-len or --max-batch-size"
)
KEPT_LINES = 400


def find_builder(release: Release) -> str:
    """The path of trtllm-build.

    Raises:
        VilaDeployError: it is not here; says what to install.
    """
    path = shutil.which(BUILDER)
    if path is None:
        raise VilaDeployError(
            f"{BUILDER} is not here",
            fix=f"install TensorRT-LLM {release.title} ({release.install[0]}) on the device",
        )
    return path


def check_capability(expected: str, title: str) -> None:
    """Raises VilaDeployError if this computer's GPU is not of that CUDA compute capability."""
    import torch

    if not torch.cuda.is_available():
        raise VilaDeployError("no CUDA GPU is here", fix=f"run the same command on the {title}")
    found = "{}.{}".format(*torch.cuda.get_device_capability())
    if found != expected:
        raise VilaDeployError(
            f"this GPU has compute capability {found}, the engine is for {expected}",
            fix=f"run the same command on the {title}, or choose another --target",
        )


def run_builder(command: list[str]) -> None:
    """Runs trtllm-build, whose paths must be absolute, with its last line as progress.

    Raises:
        VilaDeployError: it fails: with its own words, and where all of them are.
    """
    log = tempfile.NamedTemporaryFile(  # noqa: SIM115  outlives this function on failure
        "w", prefix="trtllm-build-", suffix=".log", delete=False, encoding="utf-8"
    )
    last: deque[str] = deque(maxlen=KEPT_LINES)
    # Where it runs it drops its timing cache.
    with progress(1, BUILDER) as advance, log, tempfile.TemporaryDirectory() as aside:
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=aside,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    last.append(PREFIX.sub("", line.strip()))
                    advance(last[-1][:80], steps=0)
                code = process.wait()
            finally:
                process.kill()
        if code == 0:
            advance("done")
    if code:
        raise _failure(code, last, Path(log.name))
    os.unlink(log.name)  # noqa: PTH108


def _failure(code: int, lines: deque[str], log: Path) -> VilaDeployError:
    if code == -signal.SIGKILL:
        return VilaDeployError(
            f"{BUILDER} was killed, as Linux does when memory runs out", fix=MEMORY_FIX
        )
    said = next((line for line in reversed(lines) if TROUBLE.search(line)), "")
    said = said or next((line for line in reversed(lines) if line), "it said nothing")
    memory = re.search(r"out of memory|outofmemory|cannot allocate", said, re.I)
    return VilaDeployError(
        f"{BUILDER} failed ({said[:200]})",
        fix=MEMORY_FIX if memory else f"see {log}, then run the same command again",
    )
