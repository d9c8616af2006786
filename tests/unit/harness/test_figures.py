"""Confidence intervals."""

from __future__ import annotations

import pytest

from vila_deploy.harness.figures import WILSON, bootstrap, share


@pytest.mark.parametrize(("right", "count"), [(490, 500), (3, 7), (0, 10), (10, 10)])
def test_wilsons_bounds_are_where_the_score_test_stops_rejecting(right: int, count: int) -> None:
    figure = share([1.0] * right + [0.0] * (count - right))
    assert figure.method == WILSON
    assert figure.value == right / count
    assert 0 <= figure.low < figure.high <= 1
    for bound in (figure.low, figure.high):
        distance = abs(figure.value - bound)
        deviation = (bound * (1 - bound) / count) ** 0.5
        assert distance == pytest.approx(1.959964 * deviation, abs=1e-6)


def test_bootstrap_is_repeatable_and_near_the_normal_interval() -> None:
    scores = [index % 10 / 10 for index in range(1000)]
    figure = share(scores)
    assert figure == share(scores)
    assert "seed 0" in figure.method
    spread = 1.96 * 0.2872 / 1000**0.5
    assert figure.high - figure.low == pytest.approx(2 * spread, rel=0.1)


def test_bootstrap_of_any_statistic() -> None:
    figure = bootstrap(5, lambda places: float(places.max()))
    assert figure.value == figure.high == 4
