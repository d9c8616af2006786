"""Every kernel against its reference on fresh random data, before anything is timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.check_attention import check_rope_attention, check_slots_attention
from benchmarks.gpu.check_prompt import check_prompt_attention, check_prompt_norm, check_swiglu
from benchmarks.gpu.check_step import STEP_LIMIT, check_step
from benchmarks.gpu.environment import Run, reason_of
from benchmarks.gpu.inputs import config, linears, random_packed
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.add_residual import add_residual, add_residual_reference
from vila_deploy.kernels.argmax import argmax, argmax_reference
from vila_deploy.kernels.attention import (
    SplitScratch,
    attention,
    attention_reference,
    rope_attention,
)
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.dequantize import dequantize, dequantize_reference
from vila_deploy.kernels.embed import embed, embed_reference
from vila_deploy.kernels.gate_up import gate_up, gate_up_reference
from vila_deploy.kernels.gemm import gemm, gemm_reference
from vila_deploy.kernels.gemv import gemv, gemv_reference
from vila_deploy.kernels.head import head, head_reference
from vila_deploy.kernels.kv_int8 import dequantize_vectors, quantize_vectors
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import PDL_CAPABILITY
from vila_deploy.kernels.norm_qkv import norm_qkv, norm_qkv_reference
from vila_deploy.kernels.rope_kv import rope_kv, rope_kv_reference
from vila_deploy.kernels.sample import sample, sample_reference
from vila_deploy.kernels.tile_config import TOKENS, attention_splits, gemv_programs

EPSILON, MAX_SEQ_LEN = 1e-5, 1024
# Whose tiles a rehearsal takes where the interpreter has none to check.
H100 = ComputeCapability(9, 0)
# ‖found − reference‖ / ‖reference‖ of float16 outputs: rounding alone is 2e-4 to 3e-4.
LIMIT = 2e-3
Pair = tuple[Tensor, Tensor]
NAMED = "VILA_DEPLOY_CHECK"


def measure_checks(run: Run) -> None:
    """Add a row for each kernel and model; figures that rest on a wrong one will say so."""
    check_all(run)


def measure_named_check(run: Run) -> None:
    """Repeat the check that NAMED in the environment names, e.g. "gate_up 3B"."""
    check(run, *os.environ[NAMED].split())


def check_all(run: Run) -> bool:
    """Do that, and return whether all of them agree."""
    agree = True
    for model in run.models:
        for stem in CASES:
            agree &= check(run, stem, model)
    return agree


def check(run: Run, stem: str, model: str) -> bool:
    """Add the row of one case; return whether it agrees."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    sizes, shown = config(model, "int4", small=run.small), f"{stem} {model}"
    limit = STEP_LIMIT if stem == "step" else LIMIT
    known = {"limit": limit, "seed": seed}
    try:
        rounds = 1 if run.small else 2
        worst = max(relative_error(*p) for _ in range(rounds) for p in CASES[stem](run, sizes))
    except Exception as error:  # the others go on
        run.add("check", shown, **known, agrees=False, reason=reason_of(error))
        return False
    run.add("check", shown, error=worst, **known, agrees=worst < limit)
    return worst < limit


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return ‖found − reference‖ / ‖reference‖; of integers 0 if they are equal, else infinity."""
    if not found.is_floating_point():  # tokens are right or wrong
        return 0.0 if torch.equal(found.long(), reference.long()) else float("inf")
    if not bool(torch.isfinite(found.float()).all()):
        return float("inf")
    reference = reference.double()
    return float((found.double() - reference).norm() / reference.norm().clamp(min=1e-30))


def _poison(*shape: int, run: Run, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=run.device)


def _x(run: Run, tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, device=run.device).half()


def _normed_input(run: Run, tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return x and the sums of squares that a kernel before left."""
    x = _x(run, tokens, columns)
    squares = torch.zeros(1, TOKENS, device=run.device)
    squares[0, :tokens] = x.float().square().sum(1)
    return x, squares


def _gemv(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    for rows, columns in list(linears(sizes).values())[: 1 if run.small else None]:
        for bits, tokens in ((4, 1), (4, 8), (8, 1), (16, 1)):
            weight = random_packed(rows, columns, bits, run.device)
            x, y = _x(run, tokens, columns), _poison(tokens, rows, run=run)
            gemv(x, weight, None, y, run.capability)()
            yield y, gemv_reference(x, weight, None)


def _gemm(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    rows, columns = linears(sizes)["o"]
    for tokens in (9, 33) if run.small else (16, 33, 64, 256):
        weight = random_packed(rows, columns, 4, run.device)
        x, y = _x(run, tokens, columns), _poison(tokens, rows, run=run)
        gemm(x, weight, None, y, run.capability)()
        yield y, gemm_reference(x, weight, None)


def _dequantize(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    rows, columns = linears(sizes)["down"]
    weight, y = random_packed(rows, columns, 4, run.device), _poison(rows, columns, run=run)
    dequantize(weight, y)()
    yield y, dequantize_reference(weight)


def _forms(run: Run, launch: Launch) -> Iterator[Launch]:
    """Yield a launch in the forms that the device has: as it is, and begun early."""
    yield launch
    if run.capability >= PDL_CAPABILITY:
        yield launch.with_pdl()


def _norm_qkv(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    rows, columns = linears(sizes)["qkv"]
    weight = random_packed(rows, columns, 4, run.device)
    bias = torch.randn(rows, device=run.device)
    for tokens in (1, TOKENS):
        (x, squares), y = _normed_input(run, tokens, columns), _poison(tokens, rows, run=run)
        launch = norm_qkv(x, squares, weight, bias, y, EPSILON, 2.0, run.capability)
        for form in _forms(run, launch):
            y.fill_(torch.nan)
            form()
            yield y, norm_qkv_reference(x, squares, weight, bias, EPSILON, 2.0)


def _add_residual(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    for name, tokens in (("down", 1), ("o", 1), ("down", TOKENS)):
        rows, columns = linears(sizes)[name]
        weight, x = random_packed(rows, columns, 4, run.device), _x(run, tokens, columns)
        norm = torch.rand(rows, device=run.device)
        before, out = torch.randn(tokens, rows, device=run.device), _poison(tokens, rows, run=run)
        squares = _poison(gemv_programs(run.capability, rows), TOKENS, run=run, dtype=torch.float32)
        expected, normed, total = add_residual_reference(x, weight, norm, before)
        residual = torch.empty_like(before)
        launch = add_residual(x, weight, norm, residual, out, squares, run.capability)
        for form in _forms(run, launch):
            residual.copy_(before)
            form()
            yield residual, expected
            yield out, normed
            yield squares.sum(0)[:tokens], total


def _gate_up(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    rows, columns = linears(sizes)["gate_up"]
    weight = random_packed(rows, columns, 4, run.device)
    for tokens in (1, TOKENS):
        y, (x, squares) = _poison(tokens, rows // 2, run=run), _normed_input(run, tokens, columns)
        launch = gate_up(x, squares, weight, y, EPSILON, 1.0, run.capability)
        for form in _forms(run, launch):
            y.fill_(torch.nan)
            form()
            yield y, gate_up_reference(x, squares, weight, rows // 2, EPSILON, 1.0)


def _head(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    rows, columns = linears(sizes)["head"]
    for bits, tokens in ((16, 1), (8, 1), (4, 1), (16, TOKENS)):
        weight = random_packed(rows, columns, bits, run.device)
        logits = _poison(tokens, rows, run=run, dtype=torch.float32)
        x, squares = _normed_input(run, tokens, columns)
        count = gemv_programs(run.capability, rows)
        best = torch.zeros(count, TOKENS, device=run.device)
        index = torch.zeros(count, TOKENS, dtype=torch.int32, device=run.device)
        head(x, squares, weight, logits, best, index, EPSILON, 1.0, run.capability)()
        yield logits, head_reference(x, squares, weight, EPSILON, 1.0)
        token = torch.zeros(tokens, dtype=torch.int32, device=run.device)
        history, position = torch.zeros(2, 1, dtype=torch.int32, device=run.device)
        argmax(best, index, token, history, position, step=False)()
        yield token, argmax_reference(logits)


def _sample(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    logits = torch.randn(1, sizes.vocab_size, device=run.device) * 3
    settings = torch.tensor([1 / 0.7, 0.9], device=run.device)
    token, history, position = torch.zeros(3, 1, dtype=torch.int32, device=run.device)
    for number in (0.1, 0.6, 0.97):
        uniform = torch.tensor([number], device=run.device)
        sample(logits, uniform, settings, token, history, position, step=False)()
        expected = sample_reference(logits[0], number, 0.7, 0.9)
        yield token, torch.tensor([expected], device=run.device)


def _embed(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    table = torch.randn(sizes.vocab_size, sizes.hidden_size, device=run.device).half()
    norm = torch.rand(sizes.hidden_size, device=run.device)
    token = torch.tensor([sizes.vocab_size - 1], dtype=torch.int32, device=run.device)
    residual = _poison(1, sizes.hidden_size, run=run, dtype=torch.float32)
    out, squares = residual.half(), torch.zeros(1, TOKENS, device=run.device)
    embed(token, table, norm, residual, out, squares)()
    expected, normed, total = embed_reference(token, table, norm)
    yield residual, expected
    yield out, normed
    yield squares[0, :1], total


def _rope_kv(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    angles = torch.rand(MAX_SEQ_LEN, dim // 2, device=run.device) * 6
    position = torch.tensor([300], dtype=torch.int32, device=run.device)
    for tokens in (1, 40):
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=run.device).half()
        q = _poison(tokens, heads, dim, run=run)
        keys, values = _poison(2, kv_heads, MAX_SEQ_LEN, dim, run=run)
        rope_kv(qkv, angles.cos(), angles.sin(), position, q, keys, values)()
        expected = rope_kv_reference(qkv, angles.cos(), angles.sin(), position, heads, kv_heads)
        written = slice(300, 300 + tokens)
        yield from zip((q, keys[:, written], values[:, written]), expected, strict=True)


def _attention(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    splits = attention_splits(H100 if run.rehearsed else run.capability, kv_heads, MAX_SEQ_LEN)
    for at in (0, 100 if run.small else 777):
        q = torch.randn(1, heads, dim, device=run.device).half()
        keys, values = torch.randn(2, kv_heads, MAX_SEQ_LEN, dim, device=run.device).half()
        position = torch.tensor([at], dtype=torch.int32, device=run.device)
        out = _poison(1, heads * dim, run=run)
        scratch = SplitScratch(1, heads, dim, splits, run.device)
        for launch in attention(q, keys, values, position, out, scratch, run.capability):
            launch()
        yield out, attention_reference(q, keys, values, position)


def _kv_int8(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    """Write a token in int8 and attend to it: what was stored, then the output."""
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    at, device = 100 if run.small else 777, run.device
    vectors = torch.randn(2, kv_heads, MAX_SEQ_LEN, dim, device=device).half()
    quantized, scales = quantize_vectors(vectors)
    angles = torch.rand(MAX_SEQ_LEN, dim // 2, device=device) * 6
    tables, position = (angles.cos(), angles.sin()), torch.tensor([at], device=device).int()
    qkv = torch.randn(1, (heads + 2 * kv_heads) * dim, device=device).half()
    splits = attention_splits(H100 if run.rehearsed else run.capability, kv_heads, MAX_SEQ_LEN)
    scratch, out = SplitScratch(1, heads, dim, splits, device), _poison(1, heads * dim, run=run)
    for launch in rope_attention(
        qkv, tables, *quantized, position, out, scratch, run.capability, (*scales,)
    ):
        launch()
    merged = _poison(1, heads * dim, run=run)
    (launch,) = rope_attention(
        qkv, tables, *quantized, position, merged, scratch, run.capability, (*scales,), merged=True
    )
    launch()
    yield merged, out
    q, *vectors = rope_kv_reference(qkv, *tables, position, heads, kv_heads)
    cache = dequantize_vectors(quantized, scales)
    for stored, vector in zip(cache, vectors, strict=True):
        rounded = dequantize_vectors(*quantize_vectors(vector.half()))
        yield stored[:, at : at + 1], rounded
    yield out, attention_reference(q.half(), *cache, position)


CASES: dict[str, Callable[..., Iterator[Pair]]] = {
    "gemv": _gemv,
    "gemm": _gemm,
    "dequantize": _dequantize,
    "norm_qkv": _norm_qkv,
    "rope_kv": _rope_kv,
    "attention": _attention,
    "add_residual": _add_residual,
    "gate_up": _gate_up,
    "head": _head,
    "embed": _embed,
    "rope_attention": check_rope_attention,
    "slots_attention": check_slots_attention,
    "kv_int8": _kv_int8,
    "prompt_attention": check_prompt_attention,
    "prompt_norm": check_prompt_norm,
    "swiglu": check_swiglu,
    "sample": _sample,
    "step": check_step,
}
