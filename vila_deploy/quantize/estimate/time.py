"""Predict how long a quantization takes: a cost model, and a probe of this computer's speed.

The cost model counts what the time goes into: floating-point operations of matrix products, bytes
of passes over arrays that fit into no cache, and calls of small operations; it needs only shapes.
The probe times each of the three, in about a third of a second altogether.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import (
    parameters,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.quantize.algorithms import learned_scales
from vila_deploy.quantize.algorithms.awq_clip import CLIP_STEPS
from vila_deploy.quantize.algorithms.awq_scales import GRID
from vila_deploy.quantize.algorithms.awq_stats import CLIP_SAMPLE_TOKENS
from vila_deploy.quantize.algorithms.gptq import (
    CLIPPING_RATIOS,
    HEAD_ROWS,
    REFINEMENTS,
    SCALE_FACTORS,
    ZERO_SHIFTS,
)
from vila_deploy.quantize.algorithms.output_hessian import KEY, OUTPUT_TOKENS, QUERY
from vila_deploy.utils.limits import MAX_TOKENS, ROWS_AT_A_TIME

PROBE_S = 0.1
PROBE_TOKENS, PROBE_COLUMNS, PROBE_NUMBERS = 256, 512, 1 << 22
# Passes (a number read or written) per weight: round to nearest, its error, packing and hashing.
RTN_PASSES = 60
# GPTQ's: five for each clipping, in cache; the rest is rounding, and each refinement as much.
CLIPPING_PASSES = 5 * (len(CLIPPING_RATIOS) + len(SCALE_FACTORS) * len(ZERO_SHIFTS))
GPTQ_PASSES = 30 * (1 + REFINEMENTS)
# Products per weight [out, in] by `in`, in multiply-adds: with the Hessian, for the slope of each
# refinement, and a half each, being triangular, for GPTQ's corrections and least-squares scales.
GPTQ_PRODUCTS = 1.5 + REFINEMENTS + 0.5 * (1 + REFINEMENTS)
# Error correction: two triangular solves.
CORRECTION_PRODUCTS = 1.0
# Calls for a channel in rounding and in coordinate descent, and in-cache passes within a block.
CALLS_PER_CHANNEL, BLOCK_PASSES = 12 * (1 + REFINEMENTS), 20 * (1 + REFINEMENTS)
# float64 at half the speed of float32, and how often the equations are solved.
SOLVE_COST = 2.0 * (1 + REFINEMENTS)
LEARN_PASSES = 30
# Of a decoder layer's forward pass: attention's third of it, forwards and backwards.
ATTENTION_SHARE = 1.0
# Not counted: pages touched for the first time, files, and what only the report needs. SmolLM2's
# layers took 1.25 times the counted cost, those of VILA1.5-13b's shapes 1.4 times.
UNCOUNTED = 1.3


@dataclass(frozen=True)
class Speed:
    """Speed of an idle computer: float32 operations and bytes per second, seconds per call."""

    flops: float
    bytes: float
    call_s: float


@dataclass(frozen=True)
class OperationCost:
    """Floating-point operations of matrix products, bytes of other passes, small calls."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: OperationCost) -> OperationCost:
        return OperationCost(
            self.flops + other.flops, self.bytes + other.bytes, self.calls + other.calls
        )

    def __mul__(self, times: float) -> OperationCost:
        return OperationCost(self.flops * times, self.bytes * times, self.calls * times)

    def seconds(self, speed: Speed) -> float:
        return self.flops / speed.flops + self.bytes / speed.bytes + self.calls * speed.call_s


def probe(config: VilaConfig) -> Speed:
    """Time products at the widest shape of a decoder layer, passes and calls; about 0.3 s."""
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
    """Return how often `once` runs per second of this thread's CPU time."""
    once()
    # Not wall time, which depends on what other programs are running.
    start, count = time.thread_time(), 0
    while True:
        once()
        count += 1
        elapsed = time.thread_time() - start
        if elapsed > PROBE_S:
            return count / elapsed


def round_to_nearest(config: VilaConfig) -> OperationCost:
    """Return the cost of all decoder layers by round to nearest."""
    weights = sum(rows * columns for rows, columns in config.llm.linears.values())
    return OperationCost(bytes=4.0 * RTN_PASSES * weights) * config.llm.num_layers


def measure_sensitivities(config: VilaConfig, tokens: int) -> OperationCost:
    """Return the cost of a pass forward, one forward and back, Hessians and the head."""
    llm = config.llm
    hidden, inner, heads = llm.hidden_size, llm.intermediate_size, llm.num_heads * llm.head_dim
    squares = 2 * hidden**2 + heads**2 + inner**2
    cubes = 2 * hidden**3 + heads**3 + inner**3
    layer = forward(config, tokens) * 4 + OperationCost(2.0 * tokens * squares + cubes / 3)
    head = OperationCost(4.0 * tokens * llm.vocab_size * hidden)
    return layer * (UNCOUNTED * llm.num_layers) + head


def awq_gptq(config: VilaConfig, tokens: int, group_size: int) -> OperationCost:
    """Return the cost of all decoder layers by the default algorithm."""
    llm = config.llm
    hidden, inner, heads = llm.hidden_size, llm.intermediate_size, llm.num_heads * llm.head_dim
    # The fp and the quantized pass; the Hessian of each group, a quarter twice; cross terms.
    hessians = 2 * hidden**2 + 1.25 * heads**2 + 1.25 * inner**2
    cost = forward(config, tokens) * 2
    cost += OperationCost(flops=2.0 * tokens * (hessians + heads * hidden + inner * hidden))
    factors = 2 * hidden**3 + 2 * heads**3 + 2 * inner**3
    cost += OperationCost(flops=factors / 3)
    # Attention forwards and, for the output Hessians of queries and keys, backwards.
    cost += forward(config, min(tokens, OUTPUT_TOKENS)) * ATTENTION_SHARE
    learned = learned_scales.ROWS * (2 * hidden + heads + inner)
    cost += OperationCost(bytes=4.0 * learned_scales.STEPS * LEARN_PASSES * learned)
    for name, (rows, columns) in llm.linears.items():
        corrected = name in ("self_attn.o_proj", "mlp.down_proj")
        blocks = llm.head_dim // HEAD_ROWS if name in (QUERY, KEY) else -(-rows // ROWS_AT_A_TIME)
        cost += _gptq(rows, columns, columns // group_size, corrected, blocks)
    return cost * (UNCOUNTED * llm.num_layers)


def _gptq(
    rows: int, columns: int, groups: int, error_correction: bool, blocks: int = 1
) -> OperationCost:
    products = GPTQ_PRODUCTS + (CORRECTION_PRODUCTS if error_correction else 0)
    flops = 2.0 * rows * columns**2 * products + SOLVE_COST * rows * groups**3 * 2 / 3
    passes = CLIPPING_PASSES + GPTQ_PASSES + BLOCK_PASSES
    return OperationCost(flops, 4.0 * passes * rows * columns, blocks * columns * CALLS_PER_CHANNEL)


def awq(config: VilaConfig, tokens: int) -> OperationCost:
    """Return the cost of all decoder layers by llm-awq's searches."""
    cost = OperationCost()
    for rows, columns in config.llm.linears.values():
        weight = rows * columns
        # Each ratio runs its block on all tokens; each clip is a product with a sample.
        cost += OperationCost(2.0 * (GRID + 4) * tokens * weight, 4.0 * 20 * GRID * weight)
        cost += OperationCost(2.0 * CLIP_SAMPLE_TOKENS * columns**2, 4.0 * 30 * CLIP_STEPS * weight)
    return cost * config.llm.num_layers


def evaluate(config: VilaConfig, tokens: int) -> OperationCost:
    """Return the cost of both models on so many tokens of held-out data, and their logits."""
    llm = config.llm
    layers = (forward(config, tokens) + _dequantize(config)) * (2 * llm.num_layers)
    table = llm.vocab_size * llm.hidden_size
    head = OperationCost(4.0 * tokens * table, 4.0 * 40 * tokens * llm.vocab_size)
    return layers + head


def encode(config: VilaConfig, tiles: int) -> OperationCost:
    """Return the cost of so many tiles in all through tower and projector."""
    weights = parameters(tower_tensor_specs(config)) + parameters(projector_tensor_specs(config))
    return (
        OperationCost(2.0 * tiles * config.vision.positions * weights) if tiles else OperationCost()
    )


def forward(config: VilaConfig, tokens: int) -> OperationCost:
    """Return the cost of all tokens through one decoder layer."""
    llm = config.llm
    weights = sum(rows * columns for rows, columns in llm.linears.values())
    scores = llm.num_heads * llm.head_dim * MAX_TOKENS
    passes = 12 * llm.hidden_size + 6 * llm.intermediate_size
    return OperationCost(2.0 * tokens * (weights + scores), 4.0 * tokens * passes)


def _dequantize(config: VilaConfig) -> OperationCost:
    weights = sum(rows * columns for rows, columns in config.llm.linears.values())
    return OperationCost(bytes=4.0 * 6 * weights)
