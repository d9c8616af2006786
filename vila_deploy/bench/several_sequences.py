"""Decoding of several sequences at once."""

from __future__ import annotations

import time
from pathlib import Path

from vila_deploy.bench.first_token import UNTOKENIZED_CHUNKS
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import ChoosesTokens, Session
from vila_deploy.runtime.decode_rows import decode_rows
from vila_deploy.runtime.open_engine import open_engine, slots_that_fit

SEQUENCES = 8
STEPS, WARM_UP_STEPS = 64, 4


def measure_several(folder: Path, prompt_tokens: int) -> dict[str, float] | None:
    """Return the `sequences` that decode together and their `decode_tokens_per_s`, all counted.

    Greedy tokens behind a prompt of `prompt_tokens` each, up to 8 sequences, as many as memory
    holds; None if the engine holds one alone.
    """
    slots = slots_that_fit(folder, SEQUENCES)
    if slots == 1:
        return None
    with open_engine(folder, slots) as engine:
        if engine.session.slots == 1:
            return None
        steps = STEPS + WARM_UP_STEPS
        prompt = min(prompt_tokens, engine.session.max_seq_len - steps)
        seconds = time_steps(engine.session, prompt, steps)[WARM_UP_STEPS:]
        rate = engine.session.slots * len(seconds) / sum(seconds)
        return {"sequences": engine.session.slots, "decode_tokens_per_s": rate}


def time_steps(session: Session, prompt_tokens: int, steps: int) -> list[float]:
    """Return the seconds of each of `steps` steps over all slots, which hold nothing yet."""
    embeds = session.embed_tokens((UNTOKENIZED_CHUNKS[0] * prompt_tokens)[:prompt_tokens])
    slots, last, by_host = list(range(session.slots)), list[int](), list[int]()
    for slot in slots:
        logits = session.prefill(slot, embeds)
        if isinstance(session, ChoosesTokens):
            last.append(session.first_token(slot, SamplingParams()))
        else:
            last.append(int(logits.argmax()))
            by_host.append(slot)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        rows = decode_rows(session, slots, last, by_host)
        last = [row if isinstance(row, int) else int(row.argmax()) for row in rows]
        seconds.append(time.perf_counter() - start)
    return seconds
