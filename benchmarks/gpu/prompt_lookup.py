"""Prompt-lookup decoding: guesses copied from the text so far, checked eight tokens at a time.

A step over eight tokens is to cost what a step over one costs, and gives each token the same bits
that a step over it alone would give. So the accepted tokens are those of plain greedy decoding,
whatever the guesses were; good guesses only make them come sooner. The engine does without it until
`measure_lookup` has shown on a GPU what a step over eight tokens costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import config, random_llm
from benchmarks.gpu.steps import CONTEXT, MAX_SEQ_LEN, random_cache, timed_steps
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.engine.precision import FP16
from vila_deploy.kernels.tile_config import TOKENS

LONGEST = 3  # tokens that an earlier passage must share with the end of the text


def measure_lookup(run: Run) -> None:
    """Time a step over one token and over eight of 3B: how many guesses must be right to gain."""
    sizes = config("3B", "int4", small=run.small)
    max_seq_len, context = (32, 3) if run.small else (MAX_SEQ_LEN, CONTEXT)
    llm = random_llm(sizes, max_seq_len, run.device)
    cache = random_cache(sizes, max_seq_len, run, FP16)
    step_config = StepConfig(sizes, max_seq_len, run.capability, run.device)
    one, wide = (
        timed_steps(run, DecodeStep(step_config, llm, cache, tokens), cache, context).seconds
        for tokens in (1, TOKENS)
    )
    run.add(
        "lookup", f"3B int4, {TOKENS} tokens a step", weights="random", context=context,
        one_token_ms=one * 1e3, wide_ms=wide * 1e3, tokens_to_gain=wide / one,
    )  # fmt: skip


@torch.inference_mode()
def decode(
    step: DecodeStep,
    wide: DecodeStep,
    cache: Cache,
    text: Sequence[int],
    tokens: int,
    run_step: Callable[[DecodeStep], None] = lambda step: step(),
) -> tuple[list[int], int]:
    """Decode greedily from `step.token` at the cache's position on, several tokens a step.

    Args:
        step, wide: over one token and over TOKENS tokens of the same cache.
        text: token ids of the prompt, whose repetitions serve as guesses.
        tokens: how many to decode; they must fit into the cache.
        run_step: runs a step, as a CUDA graph say.

    Returns:
        The tokens, and how many steps they took.
    """
    known, position, steps = int(step.token), int(cache.position), 0
    decoded, seen = list[int](), [*text, known]
    while len(decoded) < tokens:
        steps += 1
        if position + TOKENS > cache.keys.shape[2]:
            # No room to check guesses behind the last positions.
            step.token.fill_(known)
            cache.position.fill_(position)
            run_step(step)
            new = [int(step.token)]
        else:
            guesses = guess(seen, TOKENS - 1)
            # Columns without a guess are computed all the same; nothing is taken from them.
            columns = [known, *guesses] + [known] * (TOKENS - 1 - len(guesses))
            wide.token.copy_(wide.token.new_tensor(columns))
            cache.position.fill_(position)
            run_step(wide)
            new = accepted(guesses, wide.token.tolist())[: tokens - len(decoded)]
        position += len(new)
        decoded += new
        seen += new
        known = new[-1]
    cache.position.fill_(position)
    step.token.fill_(known)
    return decoded, steps


def guess(text: Sequence[int], count: int) -> list[int]:
    """Return up to `count` tokens that followed the last earlier passage like the text's end.

    The longest common end wins, of LONGEST tokens at most.
    """
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        end = list(text[-size:])
        for start in range(len(text) - size - 1, -1, -1):
            if list(text[start : start + size]) == end:
                return list(text[start + size : start + size + count])
    return []


def accepted(guesses: Sequence[int], successors: Sequence[int]) -> list[int]:
    """Return the greedy tokens that a step has proven.

    Args:
        guesses: the tokens put behind the known one.
        successors: the greedy successor of the known token and of each guess.
    """
    right = 0
    while right < len(guesses) and guesses[right] == successors[right]:
        right += 1
    return list(successors[: right + 1])
