"""What the assembler makes of the int4 products of a step, by shape of the table.

$ python -m benchmarks.gpu.instructions     # for 9.0, without a GPU; writes the results file

A product reads its weights once, so its instructions for a weight say what share of a
multiprocessor's issue slots it needs while the memory gives all it can.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu.environment import REPOSITORY, commit
from benchmarks.gpu.inputs import MODELS, config, linears
from vila_deploy.backends.native.compile import engine_launches
from vila_deploy.kernels.aot import compile_launch
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.tile_config import ROW_BYTES, device

RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu-instructions.jsonl"
CAPABILITY, MAX_SEQ_LEN = ComputeCapability(9, 0), 1024
# An H200: what a copy moves, its clock under load, and four schedulers of an instruction a clock.
BYTES_PER_S, CLOCK_HZ, SCHEDULERS = 4.3e12, 1.98e9, 4
WEIGHT_BYTES = 4.25 / 8  # 4 bits, and 32 of scale and zero point for 128 weights
BLOCK, WARP = 128, 32
PRODUCTS = {
    "norm_qkv_kernel": ("qkv",), "add_residual_kernel": ("o", "down"),
    "gate_up_kernel": ("gate_up",),
}  # fmt: skip
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Loop:
    """The instructions of the loop over blocks, and how many of them are of a kind."""

    instructions: tuple[str, ...]

    def count(self, *names: str) -> int:
        """Return how many begin with one of the names, behind a guard."""
        opcodes = (
            re.sub(r"^@!?\w+ ", "", one).split(".")[0].split(" ")[0] for one in self.instructions
        )
        return sum(opcode in names for opcode in opcodes)


def main_loop(sass: str) -> Loop:
    """Return the innermost loop with the most products of the tensor core.

    Args:
        sass: of one kernel, as `cuobjdump -sass` prints it.
    """
    code = [(int(address, 16), text.strip()) for address, text in INSTRUCTION.findall(sass)]
    found = [Loop(())]
    for address, text in code:
        branch = BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            start = int(branch[1], 16)
            found.append(Loop(tuple(one for at, one in code if start <= at <= address)))
    return max(found, key=lambda loop: (loop.count("HMMA"), -len(loop.instructions)))


def disassemble(cubin: bytes) -> str:
    """Return SASS from the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(cubin)
        done = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True)
    return done.stdout


def issue_share(per_weight: float) -> float:
    """Return the share of a H200's issue slots that so many instructions a weight need."""
    weights_per_s = BYTES_PER_S / WEIGHT_BYTES
    slots = device(CAPABILITY).processors * SCHEDULERS * CLOCK_HZ
    return per_weight * weights_per_s / WARP / slots


def row_of(model: str, product: str, shape: tuple[int, int], launch: Launch) -> dict[str, Any]:
    """Compile a product and return its row."""
    compiled, stages = compile_launch(launch, CAPABILITY)
    loop = main_loop(disassemble(stages["cubin"]))
    rows, split, depth = (launch.constants[name] for name in ("ROWS", "SPLIT", "STAGES"))
    blocks, programs = -(-shape[1] // BLOCK), -(-shape[0] // rows)
    rounds = -(-blocks // split)
    # A warp without a block in the last round issues the same instructions.
    per_weight = len(loop.instructions) * rounds * split / blocks / (rows * BLOCK / WARP)
    processors = device(CAPABILITY).processors
    resident = min(
        65536 // (compiled.registers * 32 * split), (228 << 10) // (compiled.shared_bytes + 1024)
    )
    in_flight = min((depth - 1) * split, blocks) * rows * ROW_BYTES * programs / processors
    return {
        "kind": "instructions", "label": "compiled", "model": model, "product": product,
        "out": shape[0], "in": shape[1], "rows": rows, "split": split, "stages": depth,
        "registers": compiled.registers, "stack_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes, "loop": len(loop.instructions),
        "selects": loop.count("SEL", "ISETP"), "copies": loop.count("LDGSTS"),
        "per_weight": round(per_weight, 3), "issue_share": round(issue_share(per_weight), 3),
        "programs": programs, "resident": resident,
        "waves": round(programs / (processors * resident), 3),
        "kib_in_flight": round(in_flight / 1024, 1),
        "capability": str(CAPABILITY), "triton": triton.__version__, "commit": commit(),
        "date": str(date.today()),
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Compile every product of every model of the table."""
    found = []
    for model in MODELS:
        sizes = config(model, "int4", small=False)
        shapes = linears(sizes)
        wanted = [(kernel, name) for kernel, names in PRODUCTS.items() for name in names]
        for launch in engine_launches(sizes, MAX_SEQ_LEN, CAPABILITY):
            columns = launch.args.get("columns")
            for kernel, name in wanted:
                if (
                    launch.name == kernel
                    and columns == shapes[name][1]
                    and name not in {row["product"] for row in found if row["model"] == model}
                ):
                    found.append(row_of(model, name, shapes[name], launch))
                    print(found[-1], file=sys.stderr, flush=True)
                    break
    return found


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a results file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the results file."""
    write_rows(RESULTS, rows())


if __name__ == "__main__":
    main()
