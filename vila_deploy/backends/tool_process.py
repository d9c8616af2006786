"""Run another program that builds engines: its progress, its errors in one line, its log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections import deque
from pathlib import Path

from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import progress

ERROR_LINE = re.compile(r"error|\[E\]|exception|out of memory|required but not provided", re.I)
# Date, program and level of a log line.
PREFIX = re.compile(r"^(\[[^\]]*\]\s*)+")
MAX_LOG_LINES = 400


def run_tool(name: str, command: list[str], memory_fix: str) -> None:
    """Run a builder of NVIDIA's and show its newest line as progress.

    Args:
        command: its paths must be absolute, since it runs in a temporary folder.
        memory_fix: what to do where memory runs out.

    Raises:
        VilaDeployError: it fails; the message quotes its error and names the full log.
    """
    log = tempfile.NamedTemporaryFile(  # noqa: SIM115  outlives this function on failure
        "w", prefix=f"{name}-", suffix=".log", delete=False, encoding="utf-8"
    )
    lines: deque[str] = deque(maxlen=MAX_LOG_LINES)
    # trtllm-build writes its timing cache into the working directory.
    with progress(1, name) as advance, log, tempfile.TemporaryDirectory() as scratch:
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
        raise _failure(name, memory_fix, code, lines, Path(log.name))
    os.unlink(log.name)  # noqa: PTH108


def _failure(
    name: str, memory_fix: str, code: int, lines: deque[str], log: Path
) -> VilaDeployError:
    if code == -signal.SIGKILL:
        return VilaDeployError(
            f"{name} was killed, as Linux does when memory runs out", fix=memory_fix
        )
    message = next((line for line in reversed(lines) if ERROR_LINE.search(line)), "")
    message = message or next((line for line in reversed(lines) if line), "no output")
    memory = re.search(r"out of memory|outofmemory|cannot allocate", message, re.I)
    return VilaDeployError(
        f"{name} failed ({message[:200]})",
        fix=memory_fix if memory else f"see {log}, then run the same command again",
    )
