"""Times of a layer's products over a prompt: 4-bit weights, and cuBLAS on float16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import config, linears, random_packed
from benchmarks.gpu.timing import copies_needed, seconds
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.linear import linear

PROMPTS = (256, 512, 1024, 2048)
# Seconds that must be left for a model and a prompt.
LEAST_S = 2.0
# Their sums go to the float32 residual.
TO_RESIDUAL = ("o", "down")


def measure_prefill(run: Run) -> None:
    """Add a row for each model and length of a prompt."""
    for model in run.models:
        sizes = config(model, "int4", small=run.small)
        for tokens in (20,) if run.small else PROMPTS:
            name = f"{model} × {tokens}"
            if run.left_s < LEAST_S:
                run.add("skipped", f"{name}, prefill", reason="no time left")
                continue
            with run.attempt(f"{name}, prefill"):
                ours, half = (_layer_s(run, sizes, tokens, bits) for bits in (4, 16))
                run.add(
                    "prefill", name, tokens=tokens, int4_ms=ours * 1e3,
                    cublas_fp16_ms=half * 1e3, ratio=ours / half,
                )  # fmt: skip


def _layer_s(run: Run, sizes: LlmConfig, tokens: int, bits: int) -> float:
    """Return seconds of the products of a layer, each over weights that no cache holds."""
    total = 0.0
    for name, (rows, columns) in linears(sizes).items():
        if name != "head":
            copies = copies_needed(rows * columns * bits // 8, run.device)
            x = torch.randn(tokens, columns, device=run.device).half()
            dtype = torch.float32 if name in TO_RESIDUAL else torch.float16
            calls = [_call(run, x, rows, bits, dtype) for _ in range(copies)]
            total += seconds(calls, run.device)
    return total


def _call(
    run: Run, x: Tensor, rows: int, bits: int, dtype: torch.dtype
) -> Callable[[], object]:  # fmt: skip
    columns = x.shape[1]
    if bits == 16:
        dense = torch.randn(rows, columns, device=run.device).half() * columns**-0.5
        return lambda: torch.nn.functional.linear(x, dense)
    weight = random_packed(rows, columns, bits, run.device)
    return lambda: linear(x, weight, None, run.capability, dtype)
