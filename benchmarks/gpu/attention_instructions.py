"""What the assembler makes of a step's attention, by warps: instructions of one program.

$ python -m benchmarks.gpu.attention_instructions     # for 9.0, without a GPU

Writes the results file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import triton

from benchmarks.gpu.environment import REPOSITORY, commit
from benchmarks.gpu.inputs import MODELS, config
from benchmarks.gpu.instructions import BRANCH, INSTRUCTION, disassemble, write_rows
from vila_deploy.backends.native.compile import engine_launches
from vila_deploy.kernels.aot import compile_launch
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import LaunchMode
from vila_deploy.kernels.tile_config import attention_splits

RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu-attention.jsonl"
CAPABILITY, MAX_SEQ_LEN = ComputeCapability(9, 0), 1024
# Warps of a program → programs on a multiprocessor, for which the cache is cut into splits.
FORMS = {4: 2, 8: 1}
# With PDL the kernel asks for parts of the cache besides, while it would wait.
MODE = LaunchMode(merge_attention=True)
COUNTER = re.compile(r"\bATOMG?\b")


@dataclass(frozen=True)
class Parts:
    """Instructions of a program: ahead of its loop, in it, behind it, and where it merges all."""

    ahead: int
    loop: int
    behind: int
    merging: int


def parts(sass: str) -> Parts:
    """Return the parts of attention's merged kernel, as `cuobjdump -sass` prints it.

    The loop is the one with products of the tensor core. Merging comes behind the counter.
    """
    code = [(int(address, 16), text.strip()) for address, text in INSTRUCTION.findall(sass)]
    loops = []
    for address, text in code:
        branch = BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    start, end = max(loops, key=lambda loop: _products(code, *loop))
    counter = next(at for at, text in code if at > end and COUNTER.search(text))
    exits = [at for at, text in code if "EXIT" in text and at > counter]
    return Parts(
        ahead=_count(code, 0, start - 1),
        loop=_count(code, start, end),
        behind=_count(code, end + 1, counter),
        merging=_count(code, counter + 1, max(exits)),
    )


def _products(code: Sequence[tuple[int, str]], start: int, end: int) -> int:
    return sum("HMMA" in text for at, text in code if start <= at <= end)


def _count(code: Sequence[tuple[int, str]], start: int, end: int) -> int:
    return sum(start <= at <= end for at, _ in code)


def row_of(model: str, launch: Launch) -> dict[str, Any]:
    """Compile attention and return its row."""
    compiled, stages = compile_launch(launch, CAPABILITY)
    counted = parts(disassemble(stages["cubin"]))
    return {
        "kind": "instructions", "label": "compiled", "model": model, "product": "attention",
        "warps": launch.warps, "stages": launch.constants["STAGES"],
        "splits": launch.constants["SPLITS"], "registers": compiled.registers,
        "stack_bytes": compiled.stack_bytes, "shared_bytes": compiled.shared_bytes,
        **vars(counted), "capability": str(CAPABILITY), "triton": triton.__version__,
        "commit": commit(), "date": str(date.today()),
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Compile the attention of every model of the table with each number of warps."""
    found = []
    for model in MODELS:
        sizes = config(model, "int4", small=False)
        launches = engine_launches(sizes, MAX_SEQ_LEN, CAPABILITY, launch_mode=MODE)
        launch = next(one for one in launches if one.name == "attention_kernel")
        for warps, programs in FORMS.items():
            splits = attention_splits(CAPABILITY, sizes.num_kv_heads, MAX_SEQ_LEN, programs)
            constants = launch.constants | {"SPLITS": splits}
            found.append(row_of(model, replace(launch, warps=warps, constants=constants)))
            print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Write the results file."""
    write_rows(RESULTS, rows())


if __name__ == "__main__":
    main()
