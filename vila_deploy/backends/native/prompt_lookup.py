"""Prompt-lookup decoding: guesses copied from the text so far, checked eight tokens at a time.

A step over eight tokens costs what a step over one costs, and gives each token the same bits that a
step over it alone would give. So the accepted tokens are those of plain greedy decoding, whatever
the guesses were; good guesses only make them come sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vila_deploy.backends.native.decode_step import Cache, DecodeStep

LONGEST = 3  # tokens that a place must share with the end of the text


def guess(text: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the last earlier place where the text's end stood.

    The longest common end wins, of LONGEST tokens at most.
    """
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        end = list(text[-size:])
        for start in range(len(text) - size - 1, -1, -1):
            if list(text[start : start + size]) == end:
                return list(text[start + size : start + size + count])
    return []


def accepted(guessed: Sequence[int], following: Sequence[int]) -> list[int]:
    """The greedy tokens that a step has proven.

    Args:
        guessed: what was put behind the known token.
        following: the greedy successor of the known token and of each guess.
    """
    right = 0
    while right < len(guessed) and guessed[right] == following[right]:
        right += 1
    return list(following[: right + 1])


def run(
    step: DecodeStep,
    cache: Cache,
    known: int,
    text: Sequence[int],
    position: int,
    run_step: Callable[[DecodeStep], None] = lambda step: step(),
) -> list[int]:
    """One step over `known` at `position` and guesses behind it → one to eight new greedy tokens.

    Args:
        text: everything before, `known` last; tokens of pictures may be left out.
        run_step: runs `step`, as a graph say.
    """
    tokens = len(step.token)
    guessed = guess(text, tokens - 1)
    # Places without a guess are computed all the same; nothing is taken from them.
    filled = [known, *guessed] + [known] * (tokens - 1 - len(guessed))
    step.token.copy_(step.token.new_tensor(filled))
    cache.position.fill_(position)
    run_step(step)
    found = accepted(guessed, step.token.tolist())
    cache.position.fill_(position + len(found))
    return found
