"""Compiles a module, here or in a process of its own while the next graphs are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from vila_deploy.backends.tensorrt import files
from vila_deploy.backends.tensorrt.compile import Job, compile_graph
from vila_deploy.backends.tensorrt.compilers import COMPILERS
from vila_deploy.backends.tensorrt.trtexec import take_plan
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import read_json_object
from vila_deploy.utils.module_command import module_command
from vila_deploy.utils.progress import Advance

FAILED = 1
WARNING = "warning: "
# Engines of tensorrt-rtx have 0.97 to 1.13 times their weights, and the source of their kernels;
# one with widened 4-bit weights has two to four times.
GROWTH, KERNEL_BYTES = 1.5, 64 << 20


def compile_module(folder: Path, module: str, advance: Advance) -> dict[str, str]:
    """Compile the graph in `folder`/`module`; return the manifest's versions and capability.

    Raises:
        VilaDeployError: the compiler is missing or too old, or refuses the graph.
    """
    described = read_json_object(folder / files.DESCRIPTION)
    compiler, capability = COMPILERS[described["package"]], described["compute_capability"]
    version = compiler.check_dialect(described["dialect"])
    ahead = bool(compiler.ahead_of_time)
    job = Job(
        graph=folder / module / files.GRAPH,
        plan=folder / module / files.PLAN,
        profiles=described["profiles"][module],
        capability=capability if ahead else None,
        timing_cache=None if ahead else folder / files.TIMING_CACHE,
    )
    names = job.profiles[-1].keys()
    if not take_plan(compiler, folder, module, len(job.profiles), [*names]):
        compile_graph(compiler, job, advance)
    weights = job.graph.parent / files.WEIGHTS
    warning = growth_warning(job.plan.stat().st_size, weights.stat().st_size)
    if warning:
        print(f"{WARNING}{job.plan}: {warning}", file=sys.stderr)
    advance(f"{module}: compiled")
    return {compiler.package: version, files.CAPABILITY: capability}


def growth_warning(engine_bytes: int, weight_bytes: int) -> str:
    """Return what it means that an engine is larger than its weights; "" if it isn't."""
    if engine_bytes <= GROWTH * weight_bytes + KERNEL_BYTES:
        return ""
    return (
        f"the engine has {engine_bytes / 1e9:.2f} GB for {weight_bytes / 1e9:.2f} GB of weights: "
        "TensorRT holds them in more bits, which every step reads; build it from the fp16 "
        "checkpoint if that fits, or with --backend edge-llm or native (docs/orin.md)"
    )


class CompileWorker:
    """A process that compiles the graph in `folder`/`module`; it ends with the context."""

    def __init__(self, folder: Path, module: str):
        self._module = module
        # Not a fork of this process: torch's threads would not survive it.
        pipe, child = subprocess.PIPE, module_command(__name__, str(folder), module)
        self.process = subprocess.Popen(child, stdout=pipe, stderr=pipe, text=True)

    def __enter__(self) -> CompileWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Popen's own context waits and closes the pipes.
        with self.process as process:
            process.kill()

    def versions(self) -> dict[str, str]:
        """Wait for the end; return what compile_module returned.

        Raises:
            VilaDeployError: raised by compile_module, or the process was killed.
            OSError: raised by writing the plan.
        """
        output, messages = self.process.communicate()
        code = self.process.returncode
        lines = output.splitlines()
        if code not in (0, FAILED) or not lines:
            reason = (
                f"signal {-code}" if code < 0 else (messages.splitlines() or ["no message"])[-1]
            )
            raise VilaDeployError(
                f"compiling {self._module} ended before its time ({reason})",
                fix="close other programs if memory was short, and run the same command again",
            )
        for line in messages.splitlines():
            if line.startswith(WARNING):
                print(line, file=sys.stderr)
        return parse_answer(lines[-1])


def parse_answer(line: str) -> dict[str, str]:
    """Return the versions in the last line of `main`, or raise the exception that it holds."""
    answer = json.loads(line)
    if "problem" in answer:
        raise VilaDeployError(**answer["problem"])
    if "os" in answer:
        raise OSError(*answer["os"])
    versions: dict[str, str] = answer["versions"]
    return versions


def main() -> None:
    """Compile module argv[2] of folder argv[1]; print versions or the exception as JSON."""
    folder, module = sys.argv[1:]
    try:
        answer: dict[str, Any] = {
            "versions": compile_module(Path(folder), module, lambda text="", steps=1: None)
        }
    except VilaDeployError as error:
        where = None if error.where is None else str(error.where)
        answer = {"problem": {"what": error.what, "where": where, "fix": error.fix}}
    except OSError as error:
        answer = {"os": [error.errno, error.strerror, str(error.filename or folder)]}
    print(json.dumps(answer))
    if "versions" not in answer:
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
