"""One step of several sequences, each token chosen by the engine or by the host."""

from __future__ import annotations

from collections.abc import Sequence

from vila_deploy.engine.session import ChoosesTokens, Session
from vila_deploy.utils.arrays import Floats


def decode_rows(
    session: Session, slots: Sequence[int], tokens: Sequence[int], by_host: Sequence[int]
) -> list[int | Floats]:
    """Append a token to each slot; return the next one, or logits [vocab] for rows `by_host`."""
    if not isinstance(session, ChoosesTokens) or len(by_host) == len(slots):
        return [*session.decode(slots, tokens)]
    chosen, logits = session.next_tokens(slots, tokens, by_host)
    found: list[int | Floats] = [*chosen]
    for row, of_row in zip(by_host, logits, strict=True):
        found[row] = of_row
    return found
