"""Scores with their 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE, Z = 0.95, 1.959963984540054
RESAMPLES, BOOTSTRAP_SEED = 2000, 0
WILSON = "Wilson"
BOOTSTRAP = f"bootstrap, percentiles of {RESAMPLES} resamples, seed {BOOTSTRAP_SEED}"
Places = NDArray[np.int64]
Statistic = Callable[[Places], float]
"""statistic(places): the figure of the units at these places, which may repeat."""


@dataclass(frozen=True)
class Figure:
    """A figure and the interval that holds its true value with probability CONFIDENCE.

    Args:
        count: units that it was measured on.
        method: of the interval.
    """

    value: float
    low: float
    high: float
    count: int
    method: str

    def percent(self) -> Figure:
        """Return the same in percent."""
        return Figure(100 * self.value, 100 * self.low, 100 * self.high, self.count, self.method)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "confidence": CONFIDENCE}


def share(scores: Sequence[float]) -> Figure:
    """Return the mean of scores from 0 to 1: Wilson's interval if all are 0 or 1, else bootstrap.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    values = np.array(scores, np.float64)
    if not set(scores) <= {0.0, 1.0}:
        return bootstrap(len(scores), lambda places: float(values[places].mean()))
    count, mean = len(scores), float(values.mean())
    spread = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    centre, scale = mean + Z * Z / (2 * count), 1 + Z * Z / count
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    return Figure(mean, low, high, count, WILSON)


def bootstrap(count: int, statistic: Statistic) -> Figure:
    """Return a statistic of `count` units with the percentiles of its resamples (Efron 1979)."""
    random = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [statistic(random.integers(0, count, count)) for _ in range(RESAMPLES)]
    outside = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [outside, 100 - outside])
    return Figure(statistic(np.arange(count)), float(low), float(high), count, BOOTSTRAP)
