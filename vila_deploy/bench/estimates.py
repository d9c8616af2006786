"""How long a row will take here and how fast it would be, from the rows that have run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.bench.measure_row import FEWEST_STEPS, TINYCHAT_CONTEXT, MeasureSettings
from vila_deploy.bench.table_rows import RowPlan
from vila_deploy.checkpoint.presets import PRESETS

Row = dict[str, Any]
# Until a row has run: what two cores of a server do at least. A GPU does more.
BUILD_BYTES_PER_S, LOAD_BYTES_PER_S = 1.2e8, 3e8
FLOPS_PER_S_OF_A_CORE, FLOPS_PER_S_OF_A_GPU = 6e10, 2e13
FIXED_S = 6.0
# Of the memory's bandwidth, with making room for it.
READING_SECONDS = 0.6
DISK_PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class Rates:
    """Bytes and operations a second of this computer.

    Args:
        build: bytes of an engine written and hashed.
        load: bytes of an engine checked and opened.
        flops: floating-point operations of vision tower and prefill.
        share: of the memory bandwidth that decoding reaches, by precision; None as the key: of all.
    """

    build: float
    load: float
    flops: float
    bandwidth: float
    share: dict[str | None, float]

    def learn(self, rows: Iterable[Row]) -> Rates:
        """Return the medians of rows of released models, and these rates where there is none.

        A small model of the user's reads its weights from caches and says nothing about a large
        one.
        """
        measured = [row for row in rows if row["label"] == "measured" and row["model"] in PRESETS]
        bandwidths = [bw for row in measured if (bw := row["read_bandwidth_bytes_per_s"])]
        shares: dict[str | None, list[float]] = {}
        for row in measured:
            if row["roofline_fraction"]:
                for key in (row["precision"], None):
                    shares.setdefault(key, []).append(row["roofline_fraction"])

        def rate(amount: str, seconds: str, default: float) -> float:
            known = [r[amount] / r[seconds] for r in measured if r.get(amount) and r.get(seconds)]
            return statistics.median(known) if known else default

        return Rates(
            build=rate("disk_bytes", "build_s", self.build),
            load=rate("disk_bytes", "load_s", self.load),
            flops=rate("prompt_flops", "first_token_s", self.flops),
            # Read beside each row, and so under the same load.
            bandwidth=statistics.median(bandwidths) if bandwidths else self.bandwidth,
            share={key: statistics.median(values) for key, values in shares.items()},
        )

    def share_of(self, precision: str) -> float | None:
        """Return the median share of rows of that precision, else of all; None without any."""
        return self.share.get(precision, self.share.get(None))


def first_rates(folder: Path, bandwidth: float, gpu: bool) -> Rates:
    """Return rates for a computer that has run no row; the disk below `folder` is tried out."""
    cores = len(os.sched_getaffinity(0))
    flops = FLOPS_PER_S_OF_A_GPU if gpu else cores * FLOPS_PER_S_OF_A_CORE
    build = min(BUILD_BYTES_PER_S, disk_bytes_per_s(folder))
    return Rates(build, LOAD_BYTES_PER_S, flops, bandwidth, {})


def disk_bytes_per_s(folder: Path, size: int = DISK_PROBE_BYTES) -> float:
    """Return how many bytes a second reach the disk of `folder`, from one small file.

    A disk without room for that file counts as one that is fast: rows then say that it is full.
    """
    path = folder / "disk-probe"
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        return size / max(time.perf_counter() - start, 1e-6)
    except OSError:
        return BUILD_BYTES_PER_S
    finally:
        path.unlink(missing_ok=True)


def row_seconds(
    plan: RowPlan, rates: Rates, settings: MeasureSettings, *, builds: bool = True
) -> float:
    """Return about how long a row takes: building, opening, first tokens, decoding."""
    build = plan.disk_bytes / rates.build if builds else 0.0
    load = plan.disk_bytes / rates.load
    first_token = plan.prompt_flops / rates.flops
    runs = min(settings.first_tokens, 1 + int(settings.first_token_s / max(first_token, 1e-9)))
    share = rates.share_of(plan.build.precision) or 0.5
    step = plan.weight_bytes / rates.bandwidth / share
    steps = min(max(settings.decode_s / step, FEWEST_STEPS), settings.decode_tokens)
    decode = (2 + len(settings.contexts)) * settings.repetitions * (steps + 3) * step
    contexts = plan.prompt_flops / rates.flops * max(settings.contexts, default=0)
    contexts /= plan.prompt_tokens
    readings = (2 + len(settings.contexts)) * settings.repetitions * READING_SECONDS
    return FIXED_S + build + load + runs * first_token + decode + contexts + readings


def predict(plan: RowPlan, rates: Rates, contexts: Sequence[int]) -> dict[str, Any]:
    """Return the predicted figures of a row that has not run.

    tokens/s = share × bandwidth ÷ bytes of a step with that many cached tokens. Without a measured
    row the share is 1, so that the figure is an upper bound, and `upper_bound` says so.
    """
    share = rates.share_of(plan.build.precision)

    def tokens_per_s(context: int) -> float:
        step = plan.weight_bytes + context * plan.cache_bytes_per_token
        return (share or 1.0) * rates.bandwidth / step

    def decode(context: int) -> dict[str, Any]:
        return {"context": context, "tokens_per_s": tokens_per_s(context)}

    return {
        "decode": {"image": decode(plan.prompt_tokens), "tinychat": decode(TINYCHAT_CONTEXT)},
        "contexts": [decode(context) for context in contexts],
        "share": share,
        "upper_bound": share is None,
        "read_bandwidth_bytes_per_s": rates.bandwidth,
        "weight_bytes_per_token": plan.weight_bytes,
        "cache_bytes_per_token": plan.cache_bytes_per_token,
    }
