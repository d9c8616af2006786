"""A token drawn from the smallest set of tokens whose probability is `top_p`, on the device.

No sorting: the set is every token whose logit is at least some threshold, and bisection finds the
largest threshold whose set has mass enough. A uniform number then draws from it, in the order of
the tokens, which gives the same distribution as any other order.
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
def mass_above(
    logits_ptr: tl.tensor, rows: tl.tensor, top: tl.tensor, inverse: tl.tensor,
    threshold: tl.tensor, CHUNK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the sum of exp(z) over tokens with z = (logit − top) · inverse ≥ threshold."""
    total = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, rows, CHUNK):
        _, _, mass = chunk_above(logits_ptr, first, rows, top, inverse, threshold, CHUNK)
        total += mass
    return tl.sum(total, 0)


@triton.jit
def chunk_above(
    logits_ptr: tl.tensor, first: tl.tensor, rows: tl.tensor, top: tl.tensor, inverse: tl.tensor,
    threshold: tl.tensor, CHUNK: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return tokens from `first` on, whether z ≥ threshold, and exp(z) where it is, else 0."""
    row = first + tl.arange(0, CHUNK)
    z = (tl.load(logits_ptr + row, mask=row < rows, other=float("-inf")) - top) * inverse
    above = z >= threshold
    return row, above, tl.where(above, tl.exp(z), 0.0)


@triton.jit
def sample_kernel(
    logits_ptr: tl.tensor, uniform_ptr: tl.tensor, settings_ptr: tl.tensor, token_ptr: tl.tensor,
    history_ptr: tl.tensor, position_ptr: tl.tensor, rows: tl.tensor, history_len: tl.tensor,
    CHUNK: tl.constexpr, ROUNDS: tl.constexpr, LOWEST: tl.constexpr, STEP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    if PDL:
        wait()
    draw(
        logits_ptr, uniform_ptr, settings_ptr, token_ptr, history_ptr, position_ptr, rows,
        history_len, CHUNK, ROUNDS, LOWEST, STEP,
    )  # fmt: skip


@triton.jit
def sample_rows_kernel(
    logits_ptr: tl.tensor, uniform_ptr: tl.tensor, settings_ptr: tl.tensor, token_ptr: tl.tensor,
    position_ptr: tl.tensor, slot_ptr: tl.tensor, rows: tl.tensor, history_len: tl.tensor,
    CHUNK: tl.constexpr, ROUNDS: tl.constexpr, LOWEST: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    if PDL:
        wait()
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    if slot < 0:
        return
    settings_ptr += slot * 2
    if tl.load(settings_ptr) == 0.0:
        return
    draw(
        logits_ptr + row.to(tl.int64) * rows, uniform_ptr + slot.to(tl.int64) * history_len,
        settings_ptr, token_ptr + row, token_ptr, position_ptr + row, rows, history_len,
        CHUNK, ROUNDS, LOWEST, False,
    )  # fmt: skip


@triton.jit
def draw(
    logits_ptr: tl.tensor, uniform_ptr: tl.tensor, settings_ptr: tl.tensor, token_ptr: tl.tensor,
    history_ptr: tl.tensor, position_ptr: tl.tensor, rows: tl.tensor, history_len: tl.tensor,
    CHUNK: tl.constexpr, ROUNDS: tl.constexpr, LOWEST: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """Write one token; with STEP also to the history, and the position moves on."""
    inverse, top_p = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    position = tl.load(position_ptr)
    if STEP:
        position += 1
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    for first in range(0, rows, CHUNK):
        row = first + tl.arange(0, CHUNK)
        best = tl.maximum(best, tl.load(logits_ptr + row, mask=row < rows, other=float("-inf")))
    top = tl.max(best, 0)
    whole_mass = mass_above(logits_ptr, rows, top, inverse, LOWEST, CHUNK)
    enough_mass = whole_mass * top_p
    low, high = top * 0.0 + LOWEST, top * 0.0
    for _ in range(ROUNDS):
        middle = (low + high) * 0.5
        enough = mass_above(logits_ptr, rows, top, inverse, middle, CHUNK) >= enough_mass
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    # Where a single token is enough, the threshold is that token's own logit.
    low = tl.where(
        mass_above(logits_ptr, rows, top, inverse, high, CHUNK) >= enough_mass, high, low
    )  # fmt: skip
    target = tl.load(uniform_ptr + tl.minimum(position, history_len - 1))
    target *= mass_above(logits_ptr, rows, top, inverse, low, CHUNK)
    before = top * 0.0
    token = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for first in range(0, rows, CHUNK):
        row, above, mass = chunk_above(logits_ptr, first, rows, top, inverse, low, CHUNK)
        reached = (before + tl.cumsum(mass, 0) > target) & above
        candidate = tl.min(tl.where(reached, row, 2147483647), 0)
        token = tl.where((token < 0) & (candidate < rows), candidate, token)
        last = tl.maximum(last, tl.max(tl.where(above, row, 0), 0))
        before += tl.sum(mass, 0)
    # Rounding may leave the target behind the last sum.
    token = tl.where(token < 0, last, token)
    # The largest logit has a mass of 1, unless it is no number: then there is no token.
    token = tl.where(whole_mass > 0.0, token, -1)
    tl.store(token_ptr, token)
    if STEP:
        tl.store(history_ptr + tl.minimum(position, history_len - 1), token)
        tl.store(position_ptr, position)


def sample(
    logits: Tensor, uniform: Tensor, settings: Tensor, token: Tensor, history: Tensor,
    position: Tensor, *, step: bool,
) -> Launch:  # fmt: skip
    """Return a launch that draws the next token; with `step` it also moves on, as `argmax` does.

    Logits that are all NaN give -1, as of `argmax`.

    Args:
        logits: float32 [1, vocabulary].
        uniform: float32 [positions] in 0..1, the random number of the token at each position.
        settings: float32 [2]: 1 / temperature, and top_p above 0; 1 allows every token. They are
            in memory so that one CUDA graph serves all of them.
        token: int32 [1].
        history: int32 [positions].
        position: int32 [1]; the token belongs there, or with `step` to the next one.
    """
    assert uniform.shape == history.shape
    chunk = min(CHUNK, next_power_of_2(logits.shape[1]))
    return Launch(
        sample_kernel,
        (1,),
        {
            "logits_ptr": logits, "uniform_ptr": uniform, "settings_ptr": settings,
            "token_ptr": token, "history_ptr": history, "position_ptr": position,
            "rows": logits.shape[1], "history_len": history.shape[0],
        },
        {"CHUNK": chunk, "ROUNDS": ROUNDS, "LOWEST": LOWEST, "STEP": step, "PDL": False},
        8,
    )  # fmt: skip


def sample_rows(
    logits: Tensor, uniform: Tensor, settings: Tensor, token: Tensor, position: Tensor, slot: Tensor
) -> Launch:
    """Return a launch that draws the next token of several sequences, each as `sample` would.

    Args:
        logits: float32 [rows, vocabulary].
        uniform: float32 [slots, positions].
        settings: float32 [slots, 2]; where 1 / temperature is 0, the row's token stays.
        token, position, slot: int32 [rows]; a row of slot -1 is left out.
    """
    chunk = min(CHUNK, next_power_of_2(logits.shape[1]))
    return Launch(
        sample_rows_kernel,
        (len(token),),
        {
            "logits_ptr": logits, "uniform_ptr": uniform, "settings_ptr": settings,
            "token_ptr": token, "position_ptr": position, "slot_ptr": slot,
            "rows": logits.shape[1], "history_len": uniform.shape[1],
        },
        {"CHUNK": chunk, "ROUNDS": ROUNDS, "LOWEST": LOWEST, "PDL": False},
        8,
    )  # fmt: skip


def nucleus_reference(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return which tokens may be drawn, bool [vocabulary]: sorted, up to a mass of top_p."""
    order = logits.argsort(descending=True, stable=True)
    shares = (logits.double() / temperature).softmax(0)[order]
    nucleus = torch.zeros_like(logits, dtype=torch.bool)
    nucleus[order[shares.cumsum(0) - shares < top_p]] = True
    return nucleus


def sample_reference(logits: Tensor, uniform: float, temperature: float, top_p: float) -> int:
    """Return the token of `logits` [vocabulary] that the number in 0..1 draws."""
    nucleus = nucleus_reference(logits, temperature, top_p)
    shares = torch.where(nucleus, (logits.double() / temperature).softmax(0), 0.0)
    reached = shares.cumsum(0) > uniform * shares.sum()
    return int(reached.int().argmax())
