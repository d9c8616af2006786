"""Bits under a budget, beside the best of all choices on small cases."""

from __future__ import annotations

import itertools
import random

import pytest

from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.bit_choice import BitChoice, choose_bits

NAMES = ("a", "b", "c", "d", "e", "f")


def case(seed: int, widths: tuple[int, ...]) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    numbers = random.Random(seed)
    costs = {name: numbers.expovariate(1) for name in NAMES}
    kl = {name: {b: cost / (2**b - 1) ** 2 for b in widths} for name, cost in costs.items()}
    return kl, {name: numbers.choice((1, 2, 4)) * 64 for name in NAMES}


@pytest.mark.parametrize("widths", [(4, 8), (4, 5, 8)])
def test_within_the_budget_and_near_the_best(widths: tuple[int, ...]) -> None:
    for seed in range(5):
        kl, sizes = case(seed, widths)
        found = choose_bits(kl, sizes, 4.9)
        allowed = {}
        for bits in itertools.product(widths, repeat=len(NAMES)):
            given = dict(zip(NAMES, bits, strict=True))
            if sum(b * sizes[name] for name, b in given.items()) <= 4.9 * sum(sizes.values()):
                allowed[bits] = sum(kl[name][b] for name, b in given.items())
        mine = allowed[tuple(found.bits[name] for name in NAMES)]
        assert mine <= 1.5 * min(allowed.values())
        assert mine < allowed[(4,) * len(NAMES)]


def test_the_ends_of_the_range() -> None:
    kl, sizes = case(0, (4, 5, 8))
    assert set(choose_bits(kl, sizes, 4).bits.values()) == {4}
    assert set(choose_bits(kl, sizes, 8).bits.values()) == {8}


def test_it_is_kept_as_json() -> None:
    kl, sizes = case(1, (4, 8))
    choice = choose_bits(kl, sizes, 5)
    assert BitChoice.from_json(choice.to_json()) == choice
    scheme = choice.scheme(QuantScheme(64))
    assert {name: scheme.of(name).bits for name in NAMES} == choice.bits
