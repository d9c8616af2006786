"""Compiling launches for a GPU that isn't here, and what the assembler says about them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vila_deploy.kernels.launch import Launch

WARP = 32


@dataclass(frozen=True)
class Compiled:
    """One kernel for one compute capability.

    `registers` and `stack_bytes` of a thread, `shared_bytes` of a program. What a thread spills
    lies in its stack, so 0 there means that nothing is spilled.
    """

    kernel: str
    sm: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    constants: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compile_launch(launch: Launch, sm: int) -> tuple[Compiled, dict[str, Any]]:
    """Compiles for compute capability sm / 10; needs no GPU. Also returns the stages' outputs."""
    target = GPUTarget("cuda", sm, WARP)
    options = {"num_warps": launch.warps, **launch.options}
    kernel = triton.compile(source(launch), target=target, options=options)
    registers, stack_bytes = resources(kernel.asm["cubin"])
    shared_bytes = int(kernel.metadata.shared)
    compiled = Compiled(
        launch.name, sm, registers, stack_bytes, shared_bytes, launch.warps, launch.constants
    )
    return compiled, kernel.asm


def source(launch: Launch) -> ASTSource:
    """What Triton compiles, the same that its just-in-time compiler makes of the launch."""
    return ASTSource(
        launch.kernel, launch.signature(), launch.compiled_constants(), launch.attributes()
    )


def compile_all(launches: Iterable[Launch], sm: int) -> list[Compiled]:
    """Each distinct kernel among `launches` once."""
    distinct: dict[str, Launch] = {}
    for launch in launches:
        how = (launch.compiled_constants(), launch.warps, launch.options)
        key = repr((launch.name, launch.signature(), launch.attributes(), *how))
        distinct.setdefault(key, launch)
    return [compile_launch(launch, sm)[0] for launch in distinct.values()]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        done = subprocess.run(
            [tool, "-res-usage", binary], capture_output=True, text=True, check=True
        )
    return parse_usage(done.stdout)


def parse_usage(report: str) -> tuple[int, int]:
    """Registers and bytes of stack out of what `cuobjdump -res-usage` prints of one kernel."""
    (registers,) = re.findall(r"\bREG:(\d+)", report)
    (stack,) = re.findall(r"\bSTACK:(\d+)", report)
    return int(registers), int(stack)
