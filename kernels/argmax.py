"""The most likely token out of the parts that `head` left, and one step forward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import wait
from vila_deploy.kernels.tile_config import TOKENS


@triton.jit
def pick_kernel(
    best, index, token, history, position, count, slots,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    column = tl.program_id(0)
    part = tl.arange(0, COUNT)
    inside = part < count
    values = tl.load(best + part * TOKENS + column, mask=inside, other=float("-inf"))
    tokens = tl.load(index + part * TOKENS + column, mask=inside, other=2147483647)
    # The lowest token of equal logits, as argmax gives it.
    chosen = tl.min(tl.where(values == tl.max(values, 0), tokens, 2147483647), 0)
    tl.store(token + column, chosen)
    if STEP:
        where = tl.load(position) + 1
        tl.store(history + tl.minimum(where, slots - 1), chosen)
        tl.store(position, where)


def pick(
    best: Tensor, index: Tensor, token: Tensor, history: Tensor, position: Tensor, *, step: bool
) -> Launch:
    """A launch that writes the greedy token of each column into `token`.

    Args:
        best, index: as `head` fills them.
        token: int32 [tokens].
        history: int32 [slots]; with `step`, the token goes to the place of its position.
        position: int32 [1]; with `step` (one token only) it grows by one.
    """
    assert not step or token.shape[0] == 1
    return Launch(
        pick_kernel,
        (token.shape[0],),
        {
            "best": best, "index": index, "token": token, "history": history,
            "position": position, "count": best.shape[0], "slots": history.shape[0],
        },
        {
            "COUNT": next_power_of_2(best.shape[0]), "TOKENS": TOKENS, "STEP": step,
            "PDL": False,
        },
        4,
    )  # fmt: skip


def pick_reference(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row."""
    return logits.argmax(1)
