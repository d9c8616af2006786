"""Which slot a prompt gets, and how much of it is in there already."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest

from vila_deploy.runtime.prefix_cache import PrefixCache, common_prefix, prefix_cache_of
from vila_deploy.runtime.prompt import PositionKey


class Slots:
    """The lengths of slots, and nothing in them."""

    max_seq_len = 1000

    def __init__(self, slots: int):
        self.slots, self.lengths = slots, [0] * slots

    def length(self, slot: int) -> int:
        return self.lengths[slot]

    def keep(self, slot: int, tokens: int) -> None:
        assert 0 <= tokens <= self.lengths[slot]
        self.lengths[slot] = tokens


class CopyingSlots(Slots):
    def copy(self, source: int, target: int, tokens: int) -> None:
        assert source != target
        assert tokens <= self.lengths[source]
        self.lengths[target] = tokens


def fill(cache: PrefixCache, session: Slots, keys: Sequence[PositionKey]) -> tuple[int, int]:
    """Prefill a prompt; return what `claim` did."""
    claimed = cache.claim(keys)
    assert claimed is not None
    slot, cached = claimed
    assert session.lengths[slot] == cached
    session.lengths[slot] = len(keys)
    cache.extend(slot, keys[cached:])
    return slot, cached


def run(cache: PrefixCache, session: Slots, keys: Sequence[PositionKey]) -> tuple[int, int]:
    slot, cached = fill(cache, session, keys)
    cache.release(slot)
    return slot, cached


def test_the_longest_common_prefix_wins_else_the_oldest_slot() -> None:
    session = Slots(3)
    cache = PrefixCache(session)  # type: ignore[arg-type]
    cat, dog = [1, 2, *((b"cat", i) for i in range(4))], [1, 2, *((b"dog", i) for i in range(4))]
    assert run(cache, session, [*cat, 7, 8, 9]) == (0, 0)
    assert run(cache, session, [90, 91, 92]) == (1, 0)
    assert run(cache, session, [80, 81, 82]) == (2, 0)
    assert run(cache, session, [*cat, 7, 9, 9]) == (0, 7)
    assert run(cache, session, [70, 71, 72]) == (1, 0), "used longest ago"
    assert run(cache, session, [*dog, 7, 8]) == (0, 2), "another image has other positions"
    assert (cache.queries, cache.hits) == (9 + 3 + 3 + 9 + 3 + 8, 9)


def test_the_last_tokens_are_always_prefilled() -> None:
    session = Slots(1)
    cache = PrefixCache(session)  # type: ignore[arg-type]
    assert run(cache, session, [1, 2, 3, 4, 5]) == (0, 0)
    assert run(cache, session, [1, 2, 3, 4, 5]) == (0, 3)
    assert run(cache, session, [1, 2, 3]) == (0, 1)
    assert run(cache, session, [1]) == (0, 0)
    assert cache.claim([1, 2, 3], reuse=False) == (0, 0)


def test_claimed_slots_are_nobody_elses() -> None:
    session = Slots(2)
    cache = PrefixCache(session)  # type: ignore[arg-type]
    first, _ = fill(cache, session, [1, 2, 3, 4])
    second, cached = fill(cache, session, [1, 2, 3, 4])
    assert first != second
    assert cached == 0, "this session can't copy slots"
    assert cache.claim([5]) is None
    assert cache.free_slots == 0
    cache.release(first)
    assert cache.free_slots == 1


def test_prefixes_are_copied_out_of_slots_in_use_and_of_longer_ones() -> None:
    session = CopyingSlots(3)
    cache = PrefixCache(session)  # type: ignore[arg-type]
    image = [(b"cat", i) for i in range(10)]
    first, _ = fill(cache, session, [1, *image, 2, 3])
    assert fill(cache, session, [1, *image, 4, 5]) == (1, 11)
    assert session.lengths[first] == 13
    cache.release(0)
    cache.release(1)
    # Only the template's beginning is common: what a long slot holds is worth more.
    assert run(cache, session, [1, 50, 51]) == (2, 1)
    assert session.lengths[0] == session.lengths[1] == 13
    # A conversation that goes on stays in its slot.
    assert run(cache, session, [1, *image, 4, 5, 6, 7]) == (1, 13)
    # A short slot of its own is no reason to forgo a longer one of somebody else's.
    assert fill(cache, session, [1, *image, 4, 5, 6, 8]) == (1, 13)
    assert run(cache, session, [1, *image, 4, 5, 9, 9]) == (0, 13)


def test_what_was_not_recorded_is_not_trusted() -> None:
    session = Slots(1)
    cache = PrefixCache(session)  # type: ignore[arg-type]
    run(cache, session, [1, 2, 3, 4, 5])
    session.lengths[0] = 9
    assert run(cache, session, [1, 2, 3, 4, 5]) == (0, 0), "somebody else filled the slot"
    slot, _ = fill(cache, session, [1, 2, 3, 4, 5])
    session.lengths[0] = 7
    cache.release(slot)
    assert session.lengths[0] == 5, "an interrupted call"
    slot, _ = fill(cache, session, [1, 2, 3, 4, 5])
    session.lengths[0] = 4
    cache.release(slot)
    assert run(cache, session, [1, 2, 3, 4, 5]) == (0, 3)
    cache.forget(0)
    assert (cache.held_tokens, session.lengths) == (0, [0])


def test_a_session_has_one_cache_and_both_go_together() -> None:
    session = Slots(1)
    cache = prefix_cache_of(session)  # type: ignore[arg-type]
    assert prefix_cache_of(session) is cache  # type: ignore[arg-type]
    assert prefix_cache_of(Slots(1)) is not cache  # type: ignore[arg-type]
    del session
    gc.collect()
    with pytest.raises(AssertionError):
        cache.claim([1, 2])


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == common_prefix([1], [2]) == 0
    assert common_prefix([1, (b"a", 0)], [1, (b"a", 0), 5]) == 2
    assert common_prefix([1, (b"a", 0)], [1, (b"b", 0)]) == 1
