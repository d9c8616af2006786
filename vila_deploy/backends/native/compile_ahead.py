"""Bring every kernel of some engines into Triton's cache, from several processes at once.

What is there already is only counted. The calling process goes through all kernels in their order;
helpers, begun when the first one is missing, go through them from the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import torch
import triton

from vila_deploy.backends.native.compile import session_launches
from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.kernels.aot import compile_kernel, distinct
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import LaunchMode
from vila_deploy.utils.module_command import module_command

WORKER = "vila_deploy.backends.native.compile_ahead"
MOST_HELPERS = 15


@dataclass(frozen=True)
class KernelSet:
    """The kernels of one engine.

    Args:
        several: those of several sequences at once instead of those of one.
    """

    config: LlmConfig
    max_seq_len: int
    capability: ComputeCapability
    module_precision: ModulePrecision = ALL_FP16
    launch_mode: LaunchMode = field(default_factory=LaunchMode)
    several: bool = False

    def launches(self) -> list[Launch]:
        """Return what a session of the engine launches, over tensors without values."""
        return session_launches(
            self.config, self.max_seq_len, self.capability, self.module_precision,
            self.launch_mode, several=self.several,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        config, quantization = self.config, self.config.quantization
        family = next(name for name, row in LLM_FAMILIES.items() if row == config.family)
        values = {**vars(config), "family": family}
        return {
            "config": values | {"quantization": quantization and vars(quantization)},
            "max_seq_len": self.max_seq_len,
            "capability": list(self.capability),
            "module_precision": self.module_precision.to_json(),
            "launch_mode": vars(self.launch_mode),
            "several": self.several,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> KernelSet:
        """Return what `to_json` described."""
        config = values["config"]
        quantization = config["quantization"]
        config |= {
            "family": LLM_FAMILIES[config["family"]],
            "quantization": quantization and QuantizationConfig(**quantization),
        }
        return cls(
            LlmConfig(**config | {"eos_token_ids": tuple(config["eos_token_ids"])}),
            values["max_seq_len"],
            ComputeCapability(*values["capability"]),
            ModulePrecision(**values["module_precision"]),
            LaunchMode(**values["launch_mode"]),
            values["several"],
        )


@dataclass
class CompileCount:
    """Distinct kernels of a call: `compiled` by this process, `found` in the cache, helpers dead.

    What a helper compiled meanwhile counts as found.
    """

    compiled: int = 0
    found: int = 0
    failed_helpers: int = 0

    @property
    def kernels(self) -> int:
        return self.compiled + self.found

    def __add__(self, other: CompileCount) -> CompileCount:
        return CompileCount(
            self.compiled + other.compiled,
            self.found + other.found,
            self.failed_helpers + other.failed_helpers,
        )


def compile_ahead(
    sets: Sequence[KernelSet],
    helpers: int | None = None,
    on_missing: Callable[[int], None] = lambda kernels: None,
) -> CompileCount:
    """Bring all kernels of `sets` into Triton's cache and return how many were there.

    Args:
        helpers: processes beside this one; None means one for each further core.
        on_missing: called once, with the number of all kernels, if one is not in the cache.

    Raises:
        triton.CompilationError, RuntimeError: a kernel does not compile.
    """
    if helpers is None:
        helpers = min(MOST_HELPERS, len(os.sched_getaffinity(0)) - 1)
    count, working = CompileCount(), list[subprocess.Popen[bytes]]()
    launches = list(_of_all(sets))
    try:
        with _counted(count):
            for index, (launch, capability) in enumerate(launches):
                _prepare(launch, capability)
                if count.compiled == 1 and not working:
                    on_missing(len(launches))
                    working = _begin(sets, min(helpers, len(launches) - 1 - index))
    finally:
        for process in working:
            # Whatever it still works on has been compiled here meanwhile.
            if process.poll() is None:
                process.kill()
            elif process.returncode:
                count.failed_helpers += 1
            process.wait()
    return count


def compile_launches(launches: Iterable[Launch], capability: ComputeCapability) -> CompileCount:
    """Compile each distinct kernel of `launches` in this process."""
    count = CompileCount()
    with _counted(count):
        for launch in distinct(launches):
            _prepare(launch, capability)
    return count


def _begin(sets: Sequence[KernelSet], helpers: int) -> list[subprocess.Popen[bytes]]:
    request = {"sets": [one.to_json() for one in sets], "helpers": helpers}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    begun = []
    for index in range(helpers):
        with tempfile.TemporaryFile() as given:
            _write(given, {**request, "index": index})
            begun.append(
                subprocess.Popen(module_command(WORKER), stdin=given, env=environment)
            )  # fmt: skip
    return begun


def _write(file: IO[bytes], request: dict[str, Any]) -> None:
    file.write(json.dumps(request).encode())
    file.seek(0)


def _of_all(sets: Sequence[KernelSet]) -> Iterator[tuple[Launch, ComputeCapability]]:
    """Yield each distinct kernel once with its compute capability."""
    for capability in dict.fromkeys(one.capability for one in sets):
        mine = [one for one in sets if one.capability == capability]
        for launch in distinct(launch for one in mine for launch in one.launches()):
            yield launch, capability


def _prepare(launch: Launch, capability: ComputeCapability) -> None:
    """Compile the kernel, and where there is a GPU the C function that launches it."""
    kernel = compile_kernel(launch, capability)
    if torch.cuda.is_available():
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


@contextmanager
def _counted(count: CompileCount) -> Iterator[None]:
    """Count what Triton compiles and what it finds."""

    def listen(*, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            count.found += 1
        else:
            count.compiled += 1

    knobs = triton.knobs.compilation
    before, knobs.listener = knobs.listener, listen
    try:
        yield
    finally:
        knobs.listener = before


def main() -> None:
    """Compile a share of what stdin describes, the last kernels first."""
    request = json.load(sys.stdin)
    launches = list(_of_all([KernelSet.from_json(one) for one in request["sets"]]))
    for launch, capability in launches[::-1][request["index"] :: request["helpers"]]:
        _prepare(launch, capability)


if __name__ == "__main__":
    main()
