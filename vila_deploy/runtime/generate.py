"""The one generation loop, over any Session."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import Session
from vila_deploy.runtime.prefix_cache import prefix_cache_of
from vila_deploy.runtime.token_sampler import TokenSampler
from vila_deploy.utils.arrays import Floats


def generate(
    session: Session,
    embeds: Floats,
    stop_token_ids: Collection[int],
    sampling: SamplingParams,
    slot: int = 0,
) -> Iterator[int]:
    """Yield the tokens that answer a prompt [tokens, hidden], the stop token included.

    `slot` is freed first, and nothing of it is reused later.
    """
    prefix_cache_of(session).forget(slot)
    logits = session.prefill(slot, embeds)
    yield from decode_tokens(session, logits, stop_token_ids, sampling, slot)


def decode_tokens(
    session: Session,
    logits: Floats,
    stop_token_ids: Collection[int],
    sampling: SamplingParams,
    slot: int = 0,
) -> Iterator[int]:
    """Yield the tokens that follow a prefill of `slot` that gave `logits` [vocab]."""
    tokens = session.stream(slot, stop_token_ids, sampling) if sampling.on_device else None
    if tokens is not None:
        yield from tokens
        return
    sampler = TokenSampler(sampling)
    for remaining in reversed(range(sampling.max_new_tokens)):
        token = sampler.choose(logits)
        yield token
        full = session.length(slot) >= session.max_seq_len
        if token in stop_token_ids or not remaining or full:
            return
        (logits,) = session.decode([slot], [token])
