"""The greedy token out of each program's best one that `head` left, and one position forward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import wait
from vila_deploy.kernels.tile_config import TOKENS

# Instead of a token where logits are not numbers.
NO_TOKEN = -1


@triton.jit
def argmax_kernel(
    best_ptr: tl.tensor, index_ptr: tl.tensor, token_ptr: tl.tensor, history_ptr: tl.tensor,
    position_ptr: tl.tensor, count: tl.tensor, history_len: tl.tensor,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, HISTORY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    if PDL:
        wait()
    column = tl.program_id(0)
    program = tl.arange(0, COUNT)
    inside = program < count
    values = tl.load(best_ptr + program * TOKENS + column, mask=inside, other=float("-inf"))
    tokens = tl.load(index_ptr + program * TOKENS + column, mask=inside, other=2147483647)
    # The lowest token of equal logits, as torch.argmax gives it.
    token = tl.min(tl.where(values == tl.max(values, 0), tokens, 2147483647), 0)
    token = tl.where(token == 2147483647, -1, token)
    tl.store(token_ptr + column, token)
    if STEP:
        position = tl.load(position_ptr + column) + 1
        # All warps read the position before one of them writes it.
        tl.debug_barrier()
        if HISTORY:
            tl.store(history_ptr + tl.minimum(position, history_len - 1), token)
        tl.store(position_ptr + column, position)


def argmax(
    best: Tensor, index: Tensor, token: Tensor, history: Tensor | None, position: Tensor, *,
    step: bool,
) -> Launch:  # fmt: skip
    """Return a launch that writes the greedy token of each column into `token`.

    Logits that are all NaN give NO_TOKEN.

    Args:
        best, index: as `head` fills them.
        token: int32 [tokens].
        history: int32 [positions]; with `step`, the only token goes to its position there. None
            where each token is of another sequence.
        position: int32, one a sequence; with `step` each grows by one.
    """
    assert not step or len(position) == len(token)
    assert history is None or len(position) == 1
    kept = token if history is None else history
    return Launch(
        argmax_kernel,
        (token.shape[0],),
        {
            "best_ptr": best, "index_ptr": index, "token_ptr": token, "history_ptr": kept,
            "position_ptr": position, "count": best.shape[0], "history_len": kept.shape[0],
        },
        {
            "COUNT": next_power_of_2(best.shape[0]), "TOKENS": TOKENS, "STEP": step,
            "HISTORY": history is not None, "PDL": False,
        },
        4,
    )  # fmt: skip


def argmax_reference(logits: Tensor) -> Tensor:
    """Return the first of the largest logits of each row, int64 [tokens]."""
    return logits.argmax(1)
