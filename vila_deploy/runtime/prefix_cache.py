"""Reuse what slots hold: a prompt that begins as an earlier one prefills only the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, ref

from vila_deploy.engine.session import CopiesSlots, Session
from vila_deploy.runtime.prompt import PositionKey

# CPU kernels add in another order for a lone token, so that a prompt keeps two for its last chunk:
# then a cached prefix changes no bit of what follows.
LEFT_TO_PREFILL = 2


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
        self._weak_session = ref(session)
        self._slots = [_SlotRecord() for _ in range(session.slots)]
        self._clock = 0
        self.queries = self.hits = 0

    @property
    def _session(self) -> Session:
        session = self._weak_session()
        assert session is not None
        return session

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

        The slot with the longest common prefix, else the one used longest ago. Where the session
        copies slots, a prefix is copied out of a slot that others use, or that holds much more.
        The last tokens of the prompt are left to prefill. None if no slot is free.

        Args:
            reuse: False takes a slot and keeps nothing of it.
        """
        free = [slot for slot, record in enumerate(self._slots) if not record.claimed]
        if not free:
            return None
        most = max(len(keys) - LEFT_TO_PREFILL, 0) if reuse else 0
        common = [min(self._common(slot, keys), most) for slot in range(len(self._slots))]
        slot, source = self._choose(free, common)
        cached, record = common[source], self._slots[slot]
        if source == slot:
            self._session.keep(slot, cached)
        else:
            assert isinstance(self._session, CopiesSlots)
            record.keys = []
            self._session.copy(source, slot, cached)
        record.keys = list(keys[:cached])
        record.claimed = True
        self.queries += len(keys)
        self.hits += cached
        return slot, cached

    def _choose(self, free: Sequence[int], common: Sequence[int]) -> tuple[int, int]:
        """Return the slot to take, and the slot whose prefix it begins with, mostly the same."""

        def longest(slot: int) -> tuple[int, int]:
            return common[slot], -self._slots[slot].last_used

        own = max(free, key=longest)
        if not isinstance(self._session, CopiesSlots):
            return own, own
        source = max(range(len(common)), key=lambda slot: (common[slot], slot == own))
        if source == own and 2 * common[own] >= len(self._slots[own].keys):
            return own, own
        oldest = min(free, key=lambda slot: self._slots[slot].last_used)
        return oldest, source if common[source] > common[oldest] else oldest

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

    def _common(self, slot: int, keys: Sequence[PositionKey]) -> int:
        record = self._slots[slot]
        if self._session.length(slot) != len(record.keys):
            return 0
        return common_prefix(record.keys, keys)


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
