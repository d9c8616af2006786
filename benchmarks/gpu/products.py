"""Times of single products and of a whole step: ours, cuBLAS in float16, the baselines here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import baseline_tinychat, baseline_triton, baseline_vllm
from benchmarks.gpu.baseline import (
    LIMIT,
    Baseline,
    Missing,
    Opened,
    Prepared,
    error_of,
    random_quantized,
    size_bytes,
)
from benchmarks.gpu.environment import Run, reason_of
from benchmarks.gpu.inputs import config, linears
from benchmarks.gpu.timing import copies_needed, seconds
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.kernels.gemv import gemv
from vila_deploy.kernels.packed_linear import pack_float, pack_int4, pack_int8

Call = Callable[[], object]
# Seconds that must be left for a model's products by one implementation.
LEAST_S = 5.0


def measure_stream(run: Run) -> None:
    """Time the device's limits: a large copy, a large sum and a float16 product."""
    count = (1 << 16) if run.small else (4 << 30)
    source = torch.ones(count // 4, dtype=torch.float32, device=run.device)
    target = torch.empty_like(source)
    copy_s = seconds([lambda: target.copy_(source)], run.device)
    sum_s = seconds([lambda: source.sum()], run.device)
    run.add("stream", "copy", bytes_per_s=2 * count / copy_s)
    run.add("stream", "sum", bytes_per_s=count / sum_s)
    side = 64 if run.small else 8192
    a, b = torch.randn(2, side, side, device=run.device).half()
    run.add("stream", "matmul", flop_per_s=2 * side**3 / seconds([lambda: a @ b], run.device))


def measure_products(run: Run) -> None:
    """Time every product of a decoding step for each model: ours, and cuBLAS on float16 weights."""
    _measure_all(run, OWN)


def measure_marlin(run: Run) -> None:
    """Time the same by Marlin, and compare it with our steps; so the other baselines."""
    _measure_baseline(run, "marlin int4")


def measure_machete(run: Run) -> None:
    _measure_baseline(run, "machete int4")


def measure_tinychat(run: Run) -> None:
    _measure_baseline(run, "tinychat int4")


def measure_tinygemm(run: Run) -> None:
    _measure_baseline(run, "tinygemm int4")


def measure_humming(run: Run) -> None:
    _measure_baseline(run, "humming int4")


def measure_gemlite(run: Run) -> None:
    _measure_baseline(run, "gemlite int4")


def _measure_baseline(run: Run, name: str) -> None:
    _measure_all(run, [baseline for baseline in BASELINES if baseline.name == name])
    compare(run, name)


def _measure_all(run: Run, baselines: Sequence[Baseline]) -> None:
    for baseline in baselines:
        try:
            opened = baseline.open(run)
        except Missing as error:
            run.add("skipped", baseline.name, reason=str(error)[:200])
            continue
        except Exception as error:  # a baseline that doesn't run here is a result too
            run.add("failed", baseline.name, reason=reason_of(error))
            continue
        for model in run.models:
            if run.left_s < LEAST_S:
                run.add("skipped", f"{model} {baseline.name}", reason="no time left")
                continue
            _measure_model(run, model, baseline, opened)


def _measure_model(run: Run, model: str, baseline: Baseline, opened: Opened) -> None:
    sizes = config(model, "int4", small=run.small)
    agree = True
    for name, (rows, columns) in linears(sizes).items():
        # Those that the interpreter gets through, and that have whole groups.
        if (name == "head" and not baseline.heads) or (run.small and name in ("qkv", "o")):
            continue
        agree &= _measure(run, f"{model} {name} {baseline.name}", opened, rows, columns, 1)
        if not agree:
            return
        if model == "8B" and name == "gate_up":
            for tokens in (2, 4, 8):
                shown = f"{model} {name} {baseline.name} × {tokens}"
                _measure(run, shown, opened, rows, columns, tokens)
    if "fp16" not in baseline.name and "int8" not in baseline.name:
        _measure_sum(run, model, baseline, opened, sizes)


def _measure(run: Run, name: str, opened: Opened, rows: int, columns: int, tokens: int) -> bool:
    """Time one product if its result is right; return whether it is."""
    try:
        linear = random_quantized(rows, columns, run.device)
        x, first = _x(columns, tokens, run), opened.prepare(linear)
        error = error_of(first.call(x.to(first.dtype)), x, linear.dequantize())
        if error >= LIMIT:
            run.add("failed", name, reason=f"error {error:.3g} against float32, not timed")
            return False
        copies = copies_needed(first.size_bytes, run.device)
        prepared = [first, *(opened.prepare(linear) for _ in range(copies - 1))]
        time_s = seconds([bound(each, x) for each in prepared], run.device)
    except Exception as error:  # a baseline that doesn't run here is a result too
        run.add("failed", name, reason=reason_of(error))
        return False
    run.add(
        "product", name, version=opened.version, rows=rows, columns=columns, tokens=tokens,
        error=error, bytes=first.size_bytes, microseconds=time_s * 1e6,
        bytes_per_s=first.size_bytes / time_s,
    )  # fmt: skip
    return True


def _measure_sum(
    run: Run, model: str, baseline: Baseline, opened: Opened, sizes: LlmConfig
) -> None:
    """Time all products of a step in one graph; lm_head in float16, for baselines by cuBLAS."""
    shapes = {k: v for k, v in linears(sizes).items() if not (run.small and k in ("qkv", "o"))}
    head = shapes.pop("head")
    try:
        layers = [_layer(run, opened, shapes)]
        read = sum(size for _, size in layers[0])
        layers += [_layer(run, opened, shapes) for _ in range(copies_needed(read, run.device) - 1)]
        last, head_bytes = _head(run, head, ours=baseline in OWN)

        def step() -> None:
            for index in range(sizes.num_layers):
                for call, _ in layers[index % len(layers)]:
                    call()
            last()

        step_s = seconds([step], run.device)
    except Exception as error:
        run.add("failed", f"{model} step {baseline.name}", reason=reason_of(error))
        return
    total = read * sizes.num_layers + head_bytes
    run.add(
        "step_products", f"{model} step {baseline.name}", version=opened.version, weights="random",
        holds="products of all layers and lm_head in float16; no norms, attention or cache",
        milliseconds=step_s * 1e3, steps_per_s=1 / step_s, bytes=total, bytes_per_s=total / step_s,
    )  # fmt: skip


def _layer(
    run: Run, opened: Opened, shapes: Mapping[str, tuple[int, int]]
) -> list[tuple[Call, int]]:
    """Return calls of a layer's products over its own weights, with the bytes of each."""
    calls: list[tuple[Call, int]] = []
    for rows, columns in shapes.values():
        prepared = opened.prepare(random_quantized(rows, columns, run.device))
        calls.append((bound(prepared, _x(columns, 1, run)), prepared.size_bytes))
    return calls


def _head(run: Run, shape: tuple[int, int], *, ours: bool) -> tuple[Call, int]:
    prepare = (_ours(16) if ours else _cublas)(run).prepare
    prepared = prepare(random_quantized(*shape, run.device))
    return bound(prepared, _x(shape[1], 1, run)), prepared.size_bytes


def compare(run: Run, baseline: str) -> None:
    """Add the time of a baseline's products over that of our whole step with attention.

    That step may be of an earlier stage: rows of one file belong together.
    """
    whole = {r["name"].split()[0]: r for r in run.rows if _is_plain_step(r)}
    for row in [row for row in run.rows if row["kind"] == "step_products"]:
        model, _, name, bits = row["name"].split()
        if f"{name} {bits}" == baseline and model in whole:
            run.add(
                "ratio", f"{model} products of {name} {bits} / whole step of ours",
                ratio=row["milliseconds"] / whole[model]["milliseconds"],
            )  # fmt: skip


def _is_plain_step(row: Mapping[str, Any]) -> bool:
    return row["kind"] == "step" and row["name"].split()[1:] == ["int4"]


def bound(prepared: Prepared, x: Tensor) -> Call:
    given = x.to(prepared.dtype)
    return lambda: prepared.call(given)


def _x(columns: int, tokens: int, run: Run) -> Tensor:
    return torch.randn(tokens, columns, device=run.device).half()


def _ours(bits: int) -> Callable[[Run], Opened]:
    """Our GEMV over the given weight, or over the same weight in 8 or 16 bits."""

    def open_ours(run: Run) -> Opened:
        def prepare(linear: QuantizedLinear) -> Prepared:
            if bits == 4:
                packed = pack_int4(linear)
            else:
                packed = (pack_int8 if bits == 8 else pack_float)(linear.dequantize())
            known: dict[int, tuple[Tensor, Tensor, Call]] = {}

            def call(x: Tensor) -> Tensor:
                # A launch is over fixed buffers; the same input needs no other.
                if x.data_ptr() not in known:
                    y = torch.empty(len(x), packed.out_features, dtype=x.dtype, device=x.device)
                    known[x.data_ptr()] = (x, y, gemv(x, packed, None, y, run.capability))
                _, y, launch = known[x.data_ptr()]
                launch()
                return y

            return Prepared(call, packed.size_bytes)

        return Opened("this commit", prepare)

    return open_ours


def _cublas(run: Run) -> Opened:
    def prepare(linear: QuantizedLinear) -> Prepared:
        weight = linear.dequantize().half()
        return Prepared(lambda x: torch.nn.functional.linear(x, weight), size_bytes(weight))

    return Opened(f"torch {torch.__version__}", prepare)


OWN = (
    Baseline("ours int4", _ours(4), heads=True),
    Baseline("ours int8", _ours(8), heads=True),
    Baseline("ours fp16", _ours(16), heads=True),
    Baseline("cublas fp16", _cublas, heads=True),
)
BASELINES = (*baseline_tinychat.BASELINES, *baseline_vllm.BASELINES, *baseline_triton.BASELINES)
