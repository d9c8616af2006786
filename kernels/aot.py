"""Ahead-of-time compilation of launches for a GPU that isn't here, with the assembler's figures."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vila_deploy.kernels.cache_key import make_key
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch

WARP = 32


@dataclass(frozen=True)
class Compiled:
    """One kernel for one compute capability.

    `registers` and `stack_bytes` of a thread, `shared_bytes` of a program. What a thread spills
    lies in its stack, so 0 there means that nothing is spilled.
    """

    kernel: str
    capability: ComputeCapability
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    constants: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the row of kernels.json; `sm` is the capability as compilers number it."""
        return {
            "kernel": self.kernel,
            "sm": self.capability.sm,
            "registers": self.registers,
            "stack_bytes": self.stack_bytes,
            "shared_bytes": self.shared_bytes,
            "warps": self.warps,
            "constants": self.constants,
        }


def compile_launch(
    launch: Launch, capability: ComputeCapability
) -> tuple[Compiled, dict[str, Any]]:
    """Return the compiled kernel's figures, and the output of each of the compiler's stages.

    Needs no GPU.
    """
    kernel = compile_kernel(launch, capability)
    registers, stack_bytes = resources(kernel.asm["cubin"])
    shared_bytes = int(kernel.metadata.shared)
    compiled = Compiled(
        launch.name, capability, registers, stack_bytes, shared_bytes, launch.warps,
        launch.constants,
    )  # fmt: skip
    return compiled, kernel.asm


def compile_kernel(launch: Launch, capability: ComputeCapability) -> triton.compiler.CompiledKernel:
    """Return Triton's kernel of a launch, out of its cache if it is there."""
    target = GPUTarget("cuda", capability.sm, WARP)
    options = {"num_warps": launch.warps, **launch.options}
    return triton.compile(source(launch), target=target, options=options)


def source(launch: Launch) -> ASTSource:
    """Return the source that Triton's just-in-time compiler would make of the launch."""
    make_key(launch.kernel)
    return ASTSource(
        launch.kernel, launch.signature(), launch.compiled_constants(), launch.attributes()
    )


def compile_all(launches: Iterable[Launch], capability: ComputeCapability) -> list[Compiled]:
    """Compile each distinct kernel among `launches` once."""
    return [compile_launch(launch, capability)[0] for launch in distinct(launches)]


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return the first of the launches of each kernel that would be compiled."""
    found: dict[str, Launch] = {}
    for launch in launches:
        options = (launch.compiled_constants(), launch.warps, launch.options)
        key = repr((launch.name, launch.signature(), launch.attributes(), *options))
        found.setdefault(key, launch)
    return [*found.values()]


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack bytes of a thread, from the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        done = subprocess.run(
            [tool, "-res-usage", binary], capture_output=True, text=True, check=True
        )
    return parse_usage(done.stdout)


def parse_usage(report: str) -> tuple[int, int]:
    """Return registers and stack bytes out of `cuobjdump -res-usage`'s report of one kernel."""
    (registers,) = re.findall(r"\bREG:(\d+)", report)
    (stack,) = re.findall(r"\bSTACK:(\d+)", report)
    return int(registers), int(stack)
