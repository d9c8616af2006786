"""Reuse what slots hold: a prompt that begins as an earlier one prefills only the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, proxy

from vila_deploy.engine.session import Session
from vila_deploy.runtime.prompt import PositionKey


@dataclass
class _SlotRecord:
    """What a slot holds, position by position, and when it was used last."""

    keys: list[PositionKey] = field(default_factory=list)
    last_used: int = 0
    claimed: bool = False


class PrefixCache:
    """Hand out the slots of a session so that as many cached positions as possible are kept.

    `prefix_cache_of` returns the one of a session: all that fill its slots must use the same.
    Whoever does it without this cache calls `forget`; a slot whose length is not the recorded one
    counts as empty too. `queries` and `hits` count the tokens of claimed prompts and those of them
    that were cached.
    """

    def __init__(self, session: Session):
        # A weak reference, so that this cache lives as long as its session and no longer.
        self._session: Session = proxy(session)
        self._slots = [_SlotRecord() for _ in range(session.slots)]
        self._clock = 0
        self.queries = self.hits = 0

    @property
    def free_slots(self) -> int:
        """Return how many slots nobody has claimed."""
        return sum(not record.claimed for record in self._slots)

    @property
    def held_tokens(self) -> int:
        """Return how many positions all slots hold together."""
        return sum(len(record.keys) for record in self._slots)

    def claim(self, keys: Sequence[PositionKey], reuse: bool = True) -> tuple[int, int] | None:
        """Take a free slot for a prompt; return (slot, its tokens that the slot holds already).

        The slot with the longest common prefix, else the one used longest ago. At least one token
        of the prompt is left to prefill. None if no slot is free.

        Args:
            reuse: False takes a slot and keeps nothing of it.
        """
        free = [slot for slot, record in enumerate(self._slots) if not record.claimed]
        if not free:
            return None
        cached = {slot: self._cached(slot, keys) if reuse else 0 for slot in free}
        slot = max(free, key=lambda slot: (cached[slot], -self._slots[slot].last_used))
        record = self._slots[slot]
        self._session.keep(slot, cached[slot])
        record.keys = list(keys[: cached[slot]])
        record.claimed = True
        self.queries += len(keys)
        self.hits += cached[slot]
        return slot, cached[slot]

    def extend(self, slot: int, keys: Sequence[PositionKey]) -> None:
        """Record that `slot` holds `keys` behind the others."""
        self._slots[slot].keys += keys

    def release(self, slot: int) -> None:
        """Give a slot back; what it holds stays until another prompt takes it."""
        self.trim(slot)
        self._clock += 1
        record = self._slots[slot]
        record.last_used, record.claimed = self._clock, False

    def trim(self, slot: int) -> None:
        """Forget positions that were not recorded, as of an interrupted call."""
        record = self._slots[slot]
        recorded, held = len(record.keys), self._session.length(slot)
        if held < recorded:
            del record.keys[held:]
        elif held > recorded:
            self._session.keep(slot, recorded)

    def forget(self, slot: int) -> None:
        """Empty a slot, whatever it holds."""
        self._slots[slot].keys = []
        self._session.keep(slot, 0)

    def _cached(self, slot: int, keys: Sequence[PositionKey]) -> int:
        record = self._slots[slot]
        if self._session.length(slot) != len(record.keys):
            return 0
        return min(common_prefix(record.keys, keys), len(keys) - 1)


_CACHES: WeakKeyDictionary[Session, PrefixCache] = WeakKeyDictionary()


def prefix_cache_of(session: Session) -> PrefixCache:
    """Return the prefix cache of `session`, the same one each time."""
    if session not in _CACHES:
        _CACHES[session] = PrefixCache(session)
    return _CACHES[session]


def common_prefix(first: Sequence[PositionKey], second: Sequence[PositionKey]) -> int:
    """Return how many positions at the beginning are equal."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
