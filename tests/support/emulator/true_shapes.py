"""The kernels of a layer of 3B and 8B at their true shapes, compiled and executed without a GPU.

$ python -m tests.support.emulator.true_shapes     # writes a results file; about half an hour
$ python -m tests.support.emulator.true_shapes attention     # writes the rows of that kernel anew

A row is one kernel for one compute capability against its float32 reference, without race checks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu.checks import CASES, LIMIT, relative_error
from benchmarks.gpu.environment import REPOSITORY, Run, commit
from benchmarks.gpu.inputs import config, linears, random_packed
from tests.support.emulator.capabilities import NEWEST, OTHERS
from tests.support.emulator.device import EmulatedDevice
from tests.support.emulator.triton_driver import install
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.add_residual import add_residual, add_residual_reference
from vila_deploy.kernels.attention import SplitScratch, attention_reference, rope_attention
from vila_deploy.kernels.rope_kv import rope_kv_reference
from vila_deploy.kernels.tile_config import TOKENS, attention_splits, gemv_programs
from vila_deploy.onnx_export.rotary import rotary_tables

RESULTS = REPOSITORY / "benchmarks" / "results" / "true-shapes-ptx.jsonl"
MODELS, MAX_SEQ_LEN, POSITION = ("3B", "8B"), 1024, 543
Pairs = Iterator[tuple[Tensor, Tensor]]


def _residual(name: str) -> Callable[[Run, LlmConfig], Pairs]:
    def check(run: Run, sizes: LlmConfig) -> Pairs:
        rows, columns = linears(sizes)[name]
        weight, x = random_packed(rows, columns, 4, run.device), torch.randn(1, columns).half()
        norm, residual = torch.rand(rows), torch.randn(1, rows)
        out = torch.full((1, rows), torch.nan).half()
        squares = torch.full((gemv_programs(run.capability, rows), TOKENS), torch.nan)
        expected = add_residual_reference(x, weight, norm, residual)
        add_residual(x, weight, norm, residual, out, squares, run.capability)()
        yield from zip((residual, out, squares.sum(0)[:1]), expected, strict=True)

    return check


def _attention(run: Run, sizes: LlmConfig) -> Pairs:
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    cos, sin = rotary_tables(sizes, MAX_SEQ_LEN)
    position = torch.tensor([POSITION], dtype=torch.int32)
    qkv = torch.randn(1, (heads + 2 * kv_heads) * dim).half()
    keys, values = torch.randn(2, kv_heads, MAX_SEQ_LEN, dim).half()
    q, key, value = rope_kv_reference(qkv, cos, sin, position, heads, kv_heads)
    out = torch.full((1, heads * dim), torch.nan).half()
    splits = attention_splits(run.capability, kv_heads, MAX_SEQ_LEN)
    scratch = SplitScratch(1, heads, dim, splits, run.device)
    for launch in rope_attention(
        qkv, (cos, sin), keys, values, position, out, scratch, run.capability, merged=True
    ):
        launch()
    yield keys[:, POSITION : POSITION + 1], key
    yield values[:, POSITION : POSITION + 1], value
    yield out, attention_reference(q.half(), keys, values, position)


# The first pair of a case of the checks is of one token.
KERNELS: dict[str, Callable[[Run, LlmConfig], Pairs]] = {
    "norm_qkv": lambda run, sizes: islice(CASES["norm_qkv"](run, sizes), 1),
    "attention": _attention,
    "o": _residual("o"),
    "gate_up": lambda run, sizes: islice(CASES["gate_up"](run, sizes), 1),
    "down": _residual("down"),
}


def rows(device: EmulatedDevice, kernels: Collection[str]) -> Iterator[dict[str, Any]]:
    """Execute those of KERNELS, of every model for every compute capability."""
    for capability in (NEWEST, *OTHERS):
        device.capability = capability
        run = Run("cpu", capability, 1e9, Path("/dev/null"))
        for model in MODELS:
            sizes = config(model, "int4", small=False)
            for name in kernels:
                torch.manual_seed(0)
                begun = time.perf_counter()
                worst = max(relative_error(*pair) for pair in KERNELS[name](run, sizes))
                device.records.clear()
                yield {
                    "kind": "check", "label": "emulated", "model": model, "kernel": name,
                    "capability": str(capability), "error": worst, "limit": LIMIT,
                    "agrees": worst < LIMIT, "seconds": round(time.perf_counter() - begun, 1),
                    "triton": triton.__version__, "torch": torch.__version__,
                    "commit": commit(), "date": str(date.today()),
                }  # fmt: skip


def main() -> None:
    """Write the results file, row by row; of named kernels in the place of their old rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", choices=[*KERNELS, []], metavar="KERNEL")
    wanted = parser.parse_args().kernels or list(KERNELS)
    kept = RESULTS.read_text("utf-8").splitlines() if len(wanted) < len(KERNELS) else []
    others = [line for line in kept if json.loads(line)["kernel"] not in wanted]
    device = EmulatedDevice(NEWEST, races=False)
    install(device)
    partial = RESULTS.with_suffix(".partial")
    with torch.inference_mode(), partial.open("w", encoding="utf-8") as file:
        for line in others:
            print(line, file=file)
        for row in rows(device, wanted):
            print(json.dumps(row), file=file, flush=True)
    partial.replace(RESULTS)


if __name__ == "__main__":
    main()
