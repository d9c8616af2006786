"""A token drawn from the smallest set of tokens whose probability is `top_p`, on the device.

No sorting: the set is every token whose logit is at least some threshold, and bisection finds the
largest threshold whose set has mass enough. A uniform number then picks within it, in the order of
the tokens, which draws from the same distribution as any other order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import wait

CHUNK = 8192  # of the vocabulary at a time
ROUNDS = 40  # of bisection: 2⁻⁴⁰ of the range is below float32's spacing
LOWEST = -80.0  # a logit so far below the largest has no mass in float32


@triton.jit
def mass_above(logits, rows, top, inverse, threshold, CHUNK: tl.constexpr):
    """Sum of exp(z) over tokens with z = (logit − top) · inverse ≥ threshold."""
    total = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)
        z = (tl.load(logits + row, mask=row < rows, other=float("-inf")) - top) * inverse
        total += tl.where(z >= threshold, tl.exp(z), 0.0)
    return tl.sum(total, 0)


@triton.jit
def sample_kernel(
    logits, uniform, settings, token, history, position, rows, slots,
    CHUNK: tl.constexpr, ROUNDS: tl.constexpr, LOWEST: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    inverse, top_p = tl.load(settings), tl.load(settings + 1)
    where = tl.load(position)
    if STEP:
        where += 1
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)
        best = tl.maximum(best, tl.load(logits + row, mask=row < rows, other=float("-inf")))
    top = tl.max(best, 0)
    wanted = mass_above(logits, rows, top, inverse, LOWEST, CHUNK) * top_p
    low, high = top * 0.0 + LOWEST, top * 0.0
    for _ in range(ROUNDS):
        middle = (low + high) * 0.5
        enough = mass_above(logits, rows, top, inverse, middle, CHUNK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    # Where a single token is enough, the threshold is that token's own place.
    low = tl.where(mass_above(logits, rows, top, inverse, high, CHUNK) >= wanted, high, low)
    target = tl.load(uniform + tl.minimum(where, slots - 1))
    target *= mass_above(logits, rows, top, inverse, low, CHUNK)
    before = top * 0.0
    chosen = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)
        z = (tl.load(logits + row, mask=row < rows, other=float("-inf")) - top) * inverse
        shares = tl.where(z >= low, tl.exp(z), 0.0)
        reached = (before + tl.cumsum(shares, 0) > target) & (z >= low)
        found = tl.min(tl.where(reached, row, 2147483647), 0)
        chosen = tl.where((chosen < 0) & (found < rows), found, chosen)
        last = tl.maximum(last, tl.max(tl.where(z >= low, row, 0), 0))
        before += tl.sum(shares, 0)
    # Rounding may leave the target behind the last sum.
    chosen = tl.where(chosen < 0, last, chosen)
    tl.store(token, chosen)
    if STEP:
        tl.store(history + tl.minimum(where, slots - 1), chosen)
        tl.store(position, where)


def sample(
    logits: Tensor, uniform: Tensor, settings: Tensor, token: Tensor, history: Tensor,
    position: Tensor, *, step: bool,
) -> Launch:  # fmt: skip
    """A launch that draws the next token; with `step` it also moves on, as `pick` does.

    Args:
        logits: float32 [1, vocabulary].
        uniform: float32 [slots] in 0..1, the random number of the token at each position.
        settings: float32 [2]: 1 / temperature, and top_p above 0; 1 keeps every token. They are
            in memory so that one CUDA graph serves all of them.
        token: int32 [1].
        history: int32 [slots].
        position: int32 [1]; the token belongs there, or with `step` to the next one.
    """
    assert uniform.shape == history.shape
    chunk = min(CHUNK, next_power_of_2(logits.shape[1]))
    return Launch(
        sample_kernel,
        (1,),
        {
            "logits": logits, "uniform": uniform, "settings": settings, "token": token,
            "history": history, "position": position, "rows": logits.shape[1],
            "slots": history.shape[0],
        },
        {"CHUNK": chunk, "ROUNDS": ROUNDS, "LOWEST": LOWEST, "STEP": step, "PDL": False},
        8,
    )  # fmt: skip


def kept_reference(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Which tokens may be drawn, bool [vocabulary]: sorted, until the mass before reaches top_p."""
    order = logits.argsort(descending=True, stable=True)
    shares = (logits.double() / temperature).softmax(0)[order]
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[order[shares.cumsum(0) - shares < top_p]] = True
    return kept


def sample_reference(logits: Tensor, uniform: float, temperature: float, top_p: float) -> int:
    """The token of `logits` [vocabulary] that the number in 0..1 draws."""
    kept = kept_reference(logits, temperature, top_p)
    shares = torch.where(kept, (logits.double() / temperature).softmax(0), 0.0)
    reached = shares.cumsum(0) > uniform * shares.sum()
    return int(reached.int().argmax())
