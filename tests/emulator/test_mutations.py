"""A kernel of 9.0 without one of its barriers, or waits for copies or a grid, is found out.

Each launch of the checks is executed again with a kernel that lacks one instruction; a fault or
other bytes give it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.checks import CASES
from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import config
from tests.support.emulator import mutate
from tests.support.emulator.capabilities import NEWEST
from tests.support.emulator.device import EmulatedDevice, Record
from tests.support.emulator.replay import difference
from tests.support.emulator.source import lines_of, statement_of
from tests.support.emulator.steps import random_step
from tests.support.ptx.parse import Instruction, Kernel

# Launches of one kernel that are tried, the least costly first.
TRIED = 2
PROGRAMS = 8
ATTENTION = {
    "cached_vectors.py: vectors = tl.load(cells_ptr, mask=filled & in_dim, other=0)",
}
# Kernel → statements of which a barrier, or the wait behind the last copy, isn't needed at these
# shapes: their loops have too few rounds.
NOT_SHOWN = {
    "gemm_kernel": {"gemm.py: for block in tl.range(0, blocks, num_stages=STAGES):"},
    "attention_split_kernel": ATTENTION,
    "attention_kernel": ATTENTION,
    "prompt_attention_kernel": {
        "prompt_attention.py: for begin in tl.range(0, end, BLOCK, num_stages=STAGES):",
    },
}
# Case of the checks → kernels of which it has all that is named.
HAS_ALL = {
    "gemm": {"gemm_kernel"},
    "rope_attention": {"attention_split_kernel", "attention_kernel"},
    "prompt_attention": {"prompt_attention_kernel"},
}
DEPENDENT = {
    "embed_kernel", "norm_qkv_kernel", "attention_kernel", "add_residual_kernel",
    "gate_up_kernel", "head_kernel", "argmax_kernel",
}  # fmt: skip


def records(name: str, device: EmulatedDevice, folder: Path) -> dict[Kernel, list[Record]]:
    """Execute a case of the checks, or a step in a launch mode; return its launches by kernel."""
    torch.manual_seed(0)
    device.capability, device.keep = NEWEST, True
    try:
        if name in CASES:
            run = Run("cpu", NEWEST, 600.0, folder / "rows.jsonl")
            for _ in CASES[name](run, config("3B", "int4", small=True)):
                pass
        else:
            random_step(name).run()
    finally:
        device.keep = False
    found: dict[Kernel, list[Record]] = {}
    for record in device.records:
        found.setdefault(record.kernel, []).append(record)
    return found


def survivors(
    kernel: Kernel, launches: list[Record], indices: list[int]
) -> Iterator[tuple[int, Instruction]]:
    """Yield the instructions without which the kernel does the same, and nothing wrong."""
    launches = sorted(launches, key=lambda record: record.instructions)[:TRIED]
    for index in indices:
        mutant = mutate.without(kernel, index)
        for record in launches:
            assert record.replay is not None
            limit = 5 * max(record.instructions, 1000)
            if difference(record.replay, mutant, replace(record.replay.options, max_steps=limit)):
                break
        else:
            yield index, kernel.code[index]


def check(kernel: Kernel, launches: list[Record]) -> set[str]:
    """Every wait and barrier counts but those that are named; return the names that were met."""
    waits = [*mutate.copy_waits(kernel), *mutate.grid_waits(kernel)]
    left = [*survivors(kernel, launches, waits)]
    left += [
        (index, one)
        for index, one in survivors(kernel, launches, mutate.barriers(kernel))
        if not is_ahead_of_copies(kernel, index)
    ]
    named = NOT_SHOWN.get(kernel.name, set[str]())
    unknown = [f"{index}: {one}" for index, one in left if statement_of(one) not in named]
    assert not unknown, f"{kernel.name}: {unknown}"
    return {statement_of(one) for _, one in left}


def is_ahead_of_copies(kernel: Kernel, index: int) -> bool:
    """Return whether a barrier stands ahead of a pipelined loop's first copies.

    Triton puts one there, though nothing has used their part of shared memory before or since a
    barrier.
    """
    waited_for = (("cp", "async"), ("bar", "sync"), ("ld", "shared"))
    following = (one.opcode[:2] for one in kernel.code[index + 1 :])
    return next((one for one in following if one in waited_for), None) == ("cp", "async")


@pytest.mark.parametrize("kernel", NOT_SHOWN)
def test_what_is_named_stands_in_the_source(kernel: str) -> None:
    for named in NOT_SHOWN[kernel]:
        file, _, statement = named.partition(": ")
        assert statement in lines_of(file), named


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_missing_barrier_or_wait_is_found(
    name: str, emulated_device: EmulatedDevice, tmp_path: Path
) -> None:
    met: dict[str, set[str]] = {}
    for kernel, launches in records(name, emulated_device, tmp_path).items():
        met.setdefault(kernel.name, set()).update(check(kernel, launches))
    for stem in HAS_ALL.get(name, ()):
        assert met[stem] == NOT_SHOWN[stem], "a name that nothing needs any more"


@pytest.mark.slow
def test_a_missing_grid_barrier_is_found(emulated_device: EmulatedDevice, tmp_path: Path) -> None:
    found = records("fused", emulated_device, tmp_path)
    (kernel,) = (kernel for kernel in found if kernel.name == "fused_layer_kernel")
    (record,) = found[kernel]
    assert record.replay is not None
    # It computes the same with any number of programs, sooner with few.
    few = replace(record, replay=replace(record.replay, grid=(PROGRAMS, 1, 1)))
    assert difference(few.replay, kernel, few.replay.options) is None
    check(kernel, [few])


@pytest.mark.slow
def test_a_missing_wait_for_the_kernel_before_is_found(
    emulated_device: EmulatedDevice, tmp_path: Path
) -> None:
    found = records("pdl-merged-attention", emulated_device, tmp_path)
    for kernel, launches in found.items():
        (wait,) = mutate.grid_waits(kernel)
        assert not list(survivors(kernel, launches, [wait])), kernel.name
        # Nor may it stand behind the first load.
        loads = (i for i, one in enumerate(kernel.code) if is_load(one) and i > wait)
        late = mutate.moved(kernel, wait, next(loads))
        replay = launches[0].replay
        assert replay is not None
        assert "before griddepcontrol.wait" in (difference(replay, late, replay.options) or "")
    assert {kernel.name for kernel in found} == DEPENDENT


def is_load(instruction: Instruction) -> bool:
    return "global" in instruction.opcode and instruction.opcode[0] in ("ld", "cp")
