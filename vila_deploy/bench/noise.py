"""Which measured rows are noisy, by what was read beside them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vila_deploy.bench.host_load import is_noisy

# A row is noisy if the memory gave this share less beside it than it has given on this computer,
LOST_BANDWIDTH = 0.10
# or if its slowest repetition is this share of the median below its fastest.
SPREAD = 0.15
Row = dict[str, Any]


def best_bandwidth(rows: Collection[Row]) -> float | None:
    """Return the most that the memory gave beside one of `rows`, or beside rows before these.

    Published bandwidths don't count, nor does a row's single reading of version 0.1.0 and before.
    """
    found = [row["read_bandwidth_bytes_per_s"] for row in rows if row.get("bandwidth_readings")]
    found += [row.get("earlier_bandwidth_bytes_per_s") for row in rows]
    return max((value for value in found if value), default=None)


def noise(row: Row, best: float | None) -> list[str]:
    """Return in words what makes a measured row noisy; nothing for a quiet one.

    Args:
        best: what the memory has given on this computer, in bytes per second, if that is known.
    """
    reasons = []
    before, during = row["others_before_cores"], row["others_during_cores"]
    if is_noisy(before, during):
        reasons.append(f"others took {_cores(before)} cores before it, {_cores(during)} during it")
    bandwidth = row["read_bandwidth_bytes_per_s"]
    if row.get("bandwidth_readings") and best and bandwidth < (1 - LOST_BANDWIDTH) * best:
        reasons.append(
            f"memory gave {bandwidth / 1e9:.1f} GB/s, {1 - bandwidth / best:.0%} less than the "
            f"{best / 1e9:.1f} GB/s that it can"
        )
    decodes = row["decode"].values()
    spread = max(
        (point["max_tokens_per_s"] - point["min_tokens_per_s"]) / point["tokens_per_s"]
        for point in decodes
    )
    if spread > SPREAD:
        reasons.append(f"repetitions differ by {spread:.0%}")
    return reasons


def _cores(cores: float | None) -> str:
    return "an unknown number of" if cores is None else f"{cores:.2f}"
