"""Times of single products: ours, cuBLAS in float16, and peers that can be imported."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vila_deploy.kernels.gemv import gemv
from vila_deploy.kernels.linear import linear

from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import config, linears, random_packed
from benchmarks.gpu.timing import copies_needed, seconds
from vila_deploy.checkpoint.llm_config import LlmConfig

Call = Callable[[], object]
# Makes a call over fresh inputs of [out, in] for so many tokens, and says what it reads.
Maker = Callable[[int, int, int, Run], tuple[Call, int]]
PROMPTS = (256, 512, 1024, 2048)
GROUP = 128


def measure_stream(run: Run) -> None:
    """The ceilings: bytes per second of a large copy and of a large sum, and a float16 product."""
    count = (1 << 16) if run.rehearsed else (4 << 30)
    source = torch.ones(count // 4, dtype=torch.float32, device=run.device)
    target = torch.empty_like(source)
    copy_s = seconds([lambda: target.copy_(source)], run.device)
    sum_s = seconds([lambda: source.sum()], run.device)
    run.add("stream", "copy", bytes_per_s=2 * count / copy_s)
    run.add("stream", "sum", bytes_per_s=count / sum_s)
    side = 64 if run.rehearsed else 8192
    a, b = torch.randn(2, side, side, device=run.device).half()
    run.add("stream", "matmul", flop_per_s=2 * side**3 / seconds([lambda: a @ b], run.device))


def measure_products(run: Run) -> None:
    """Every product of a decoding step for each model, by every implementation, one token."""
    for model in ("3B",) if run.rehearsed else ("3B", "8B", "13B", "40B"):
        sizes = config(model, "int4", small=run.rehearsed)
        for name, (rows, columns) in linears(sizes).items():
            if run.rehearsed and name not in ("o", "head"):
                continue
            for maker in MAKERS if name != "head" else HEAD_MAKERS:
                _measure(run, f"{model} {name} {maker}", MAKERS[maker], rows, columns, 1)
    if not run.rehearsed:
        for tokens in (2, 4, 8):
            _measure(run, f"8B gate_up ours int4 × {tokens}", _ours(4), 28672, 4096, tokens)


def _measure(run: Run, name: str, maker: Maker, rows: int, columns: int, tokens: int) -> None:
    try:
        call, size_bytes = maker(rows, columns, tokens, run)
        copies = copies_needed(size_bytes, run.device)
        calls = [call, *(maker(rows, columns, tokens, run)[0] for _ in range(copies - 1))]
        time_s = seconds(calls, run.device)
    except Exception as error:  # a peer that doesn't run here is a result too
        run.add("failed", name, reason=f"{type(error).__name__}: {error}".splitlines()[0][:200])
        return
    run.add(
        "product", name, rows=rows, columns=columns, tokens=tokens, bytes=size_bytes,
        microseconds=time_s * 1e6, bytes_per_s=size_bytes / time_s,
    )  # fmt: skip


def measure_prefill(run: Run) -> None:
    """The products of one layer over a prompt: 4-bit weights against cuBLAS on float16 ones."""
    for model in ("3B",) if run.rehearsed else ("3B", "8B", "13B", "40B"):
        sizes = config(model, "int4", small=run.rehearsed)
        for tokens in (20,) if run.rehearsed else PROMPTS:
            ours = _layer_s(run, sizes, tokens, 4)
            half = _layer_s(run, sizes, tokens, 16)
            run.add(
                "prefill", f"{model} × {tokens}", tokens=tokens, int4_ms=ours * 1e3,
                cublas_fp16_ms=half * 1e3, ratio=ours / half,
            )  # fmt: skip


def _layer_s(run: Run, sizes: LlmConfig, tokens: int, bits: int) -> float:
    total = 0.0
    for name, (rows, columns) in linears(sizes).items():
        if name == "head":
            continue
        x = torch.randn(tokens, columns, device=run.device).half()
        if bits == 16:
            dense = torch.randn(rows, columns, device=run.device).half() * columns**-0.5
            call: Call = lambda x=x, w=dense: torch.nn.functional.linear(x, w)  # noqa: E731
        else:
            weight = random_packed(rows, columns, bits, run.device)
            call = lambda x=x, w=weight: linear(x, w, None, run.sm)  # noqa: E731
        total += seconds([call], run.device)
    return total


def _ours(bits: int) -> Maker:
    def make(rows: int, columns: int, tokens: int, run: Run) -> tuple[Call, int]:
        weight = random_packed(rows, columns, bits, run.device, GROUP)
        y = torch.empty(tokens, rows, dtype=torch.float16, device=run.device)
        return gemv(_x(columns, tokens, run), weight, None, y, run.sm), weight.size_bytes

    return make


def _x(columns: int, tokens: int, run: Run) -> Tensor:
    return torch.randn(tokens, columns, device=run.device).half()


def _cublas(rows: int, columns: int, tokens: int, run: Run) -> tuple[Call, int]:
    weight = (torch.randn(rows, columns, device=run.device) * columns**-0.5).half()
    x = _x(columns, tokens, run)
    return lambda: torch.nn.functional.linear(x, weight), weight.numel() * 2


def _tinygemm(rows: int, columns: int, tokens: int, run: Run) -> tuple[Call, int]:
    """torch's own 4-bit product: bfloat16, scale and zero of a group as two bfloat16."""
    levels = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=run.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(levels, 8)
    scales = torch.rand(columns // GROUP, rows, 2, dtype=torch.bfloat16, device=run.device) * 0.01
    x = _x(columns, tokens, run).bfloat16()
    size_bytes = packed.numel() * packed.element_size() + scales.numel() * 2
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales), size_bytes


def _gemlite(rows: int, columns: int, tokens: int, run: Run) -> tuple[Call, int]:
    """GemLite, if it is installed; unmeasured and untried so far."""
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        4, group_size=GROUP, in_features=columns, out_features=rows, input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )  # fmt: skip
    levels = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=run.device)
    groups = (rows * columns // GROUP, 1)
    scales = torch.rand(groups, device=run.device).half() * 0.01
    layer.pack(levels, scales, torch.full_like(scales, 8.0), None)
    x = _x(columns, tokens, run)
    return lambda: layer(x), rows * columns // 2 + groups[0] * 4


MAKERS: dict[str, Maker] = {
    "ours int4": _ours(4),
    "ours int8": _ours(8),
    "ours fp16": _ours(16),
    "cublas fp16": _cublas,
    "tinygemm int4": _tinygemm,
    "gemlite int4": _gemlite,
}
HEAD_MAKERS = ("ours int4", "ours int8", "ours fp16", "cublas fp16")
