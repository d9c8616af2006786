"""How long a quantization takes: its operations counted, and a probe of how fast this computer is.

The probe times, in about a third of a second, the three things that the time goes into: products of
matrices at the shapes of a decoder layer, passes over arrays that fit into no cache, and calls of
small operations. Counts are of the code as it is; they need nothing but shapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import projector_tensor_specs, tower_tensor_specs
from vila_deploy.utils.estimates import parameters
from vila_deploy.utils.limits import MAX_TOKENS, ROWS_AT_A_TIME

PROBE_S = 0.1
PROBE_TOKENS, PROBE_COLUMNS, PROBE_NUMBERS = 256, 512, 1 << 22
# Passes (a number read or written) per weight: round to nearest, its error, packing and hashing.
RTN_PASSES = 60
# Of error feedback: eleven ranges are tried, in cache; the rest is rounding and refinement.
RANGE_PASSES, FEEDBACK_PASSES = 11 * 5, 60
# Products per weight [out, in] by `in`, in multiply-adds: with the moments and for the slope, and a
# half each, being triangular, for error feedback and for scales by least squares, twice.
ROUND_PRODUCTS = 3.5
# Two triangular solves.
COMPENSATE_PRODUCTS = 1.0
# Operations of a channel in error feedback and in descent, and in-cache passes within a block.
CALLS_PER_CHANNEL, BLOCK_PASSES = 25, 40
# Half precision of float64 equations, and the two times that they are solved.
SOLVE_COST = 4.0
LEARN_STEPS, LEARN_ROWS, LEARN_PASSES = 30, 512, 30
# Pages touched for the first time, files, what only the report needs: what is not counted made
# SmolLM2's layers take 1.25 times what is, and those of VILA1.5-13b's shapes 1.4 times.
UNCOUNTED = 1.3
# llm-awq: ratios tried for each group, and shares by which ranges are cut.
GRID, CLIPS, CLIP_TOKENS = 20, 10, 512


@dataclass(frozen=True)
class Speed:
    """Of this computer with nothing else to do: float32 operations, bytes, seconds per call."""

    flops: float
    bytes: float
    call_s: float


@dataclass(frozen=True)
class Effort:
    """Floating-point operations in products of matrices, bytes of other passes, small calls."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.flops + other.flops, self.bytes + other.bytes, self.calls + other.calls)

    def __mul__(self, times: float) -> Effort:
        return Effort(self.flops * times, self.bytes * times, self.calls * times)

    def seconds(self, speed: Speed) -> float:
        return self.flops / speed.flops + self.bytes / speed.bytes + self.calls * speed.call_s


def probe(config: VilaConfig) -> Speed:
    """Times products at the widest shape of a decoder layer, passes and calls; about 0.3 s."""
    width = max(columns for _, columns in config.llm.linears.values())
    inputs, weight = torch.rand(PROBE_TOKENS, width), torch.rand(width, PROBE_COLUMNS)
    product = torch.empty(PROBE_TOKENS, PROBE_COLUMNS)
    numbers, result = torch.rand(PROBE_NUMBERS), torch.empty(PROBE_NUMBERS)
    small = torch.rand(64)
    products = _per_second(lambda: torch.mm(inputs, weight, out=product))
    passes = _per_second(lambda: torch.mul(numbers, 1.5, out=result))
    calls = _per_second(lambda: small.mul_(0.5))
    return Speed(
        flops=2.0 * PROBE_TOKENS * width * PROBE_COLUMNS * products,
        bytes=2.0 * 4 * PROBE_NUMBERS * passes,
        call_s=1 / calls,
    )


def _per_second(once: Callable[[], object]) -> float:
    once()
    # Of this thread alone, or what other programs take meanwhile would make it a lottery.
    start, count = time.thread_time(), 0
    while True:
        once()
        count += 1
        elapsed = time.thread_time() - start
        if elapsed > PROBE_S:
            return count / elapsed


def round_to_nearest(config: VilaConfig) -> Effort:
    """All decoder layers."""
    weights = sum(rows * columns for rows, columns in config.llm.linears.values())
    return Effort(bytes=4.0 * RTN_PASSES * weights) * config.llm.num_layers


def awq_gptq(config: VilaConfig, tokens: int, group_size: int) -> Effort:
    """All decoder layers by the default algorithm, with so many tokens of calibration data."""
    llm = config.llm
    hidden, inner, heads = llm.hidden_size, llm.intermediate_size, llm.num_heads * llm.head_dim
    # Exact and quantized; the moments of what enters each group, a quarter twice; cross moments.
    grams = 2 * hidden**2 + 1.25 * heads**2 + 1.25 * inner**2
    effort = _forward(config, tokens) * 2
    effort += Effort(flops=2.0 * tokens * (grams + heads * hidden + inner * hidden))
    factors = 2 * hidden**3 + 2 * heads**3 + 2 * inner**3
    effort += Effort(flops=factors / 3)
    learned = LEARN_ROWS * (2 * hidden + heads + inner)
    effort += Effort(bytes=4.0 * LEARN_STEPS * LEARN_PASSES * learned)
    for name, (rows, columns) in llm.linears.items():
        compensated = name in ("self_attn.o_proj", "mlp.down_proj")
        effort += _round(rows, columns, columns // group_size, compensated)
    return effort * (UNCOUNTED * llm.num_layers)


def _round(rows: int, columns: int, groups: int, compensated: bool) -> Effort:
    products = ROUND_PRODUCTS + (COMPENSATE_PRODUCTS if compensated else 0)
    flops = 2.0 * rows * columns**2 * products + SOLVE_COST * rows * groups**3 * 2 / 3
    passes = RANGE_PASSES + FEEDBACK_PASSES + BLOCK_PASSES
    blocks = -(-rows // ROWS_AT_A_TIME)
    return Effort(flops, 4.0 * passes * rows * columns, blocks * columns * CALLS_PER_CHANNEL)


def awq(config: VilaConfig, tokens: int) -> Effort:
    """All decoder layers as llm-awq searches them."""
    effort = Effort()
    for rows, columns in config.llm.linears.values():
        weight = rows * columns
        # Each ratio runs its block on all tokens; each clip is a product with a sample.
        effort += Effort(2.0 * (GRID + 4) * tokens * weight, 4.0 * 20 * GRID * weight)
        effort += Effort(2.0 * CLIP_TOKENS * columns**2, 4.0 * 30 * CLIPS * weight)
    return effort * config.llm.num_layers


def evaluate(config: VilaConfig, tokens: int) -> Effort:
    """Both models on so many tokens of held-out data, and their logits."""
    llm = config.llm
    layers = (_forward(config, tokens) + _dequantize(config)) * (2 * llm.num_layers)
    table = llm.vocab_size * llm.hidden_size
    head = Effort(4.0 * tokens * table, 4.0 * 40 * tokens * llm.vocab_size)
    return layers + head


def encode(config: VilaConfig, tiles: int) -> Effort:
    """Images of so many tiles in all through tower and projector."""
    weights = parameters(tower_tensor_specs(config)) + parameters(projector_tensor_specs(config))
    return Effort(2.0 * tiles * config.vision.positions * weights) if tiles else Effort()


def _forward(config: VilaConfig, tokens: int) -> Effort:
    """All tokens through one decoder layer."""
    llm = config.llm
    weights = sum(rows * columns for rows, columns in llm.linears.values())
    scores = llm.num_heads * llm.head_dim * MAX_TOKENS
    passes = 12 * llm.hidden_size + 6 * llm.intermediate_size
    return Effort(2.0 * tokens * (weights + scores), 4.0 * tokens * passes)


def _dequantize(config: VilaConfig) -> Effort:
    weights = sum(rows * columns for rows, columns in config.llm.linears.values())
    return Effort(bytes=4.0 * 6 * weights)
