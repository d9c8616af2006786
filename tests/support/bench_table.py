"""A table with a worker that measures nothing and a clock that it moves on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vila_deploy.bench.estimates import Rates
from vila_deploy.bench.fill_table import Table, TimeLimit, TimeUp
from vila_deploy.bench.measure_row import MeasureSettings
from vila_deploy.bench.results_file import ResultsFile
from vila_deploy.bench.table_rows import TableRow, plan_row, table_rows
from vila_deploy.engine.target import get_target

BANDWIDTH = 30e9
RATES = Rates(build=1e8, load=5e8, flops=1e11, bandwidth=BANDWIDTH, share={})
IDENTITY = {"device": "some CPU", "target": "cpu", "settings": {"contexts": []}, "commit": "c0"}
# What every step takes of the fake clock.
BUILD_S, MEASURE_S = 20.0, 30.0


def measured_row(model: str = "VILA1.5-3b", share: float = 0.5) -> dict[str, Any]:
    """Return what a worker measures."""
    decode = {
        "context": 256, "tokens": 128, "tokens_per_s": 15.0, "min_tokens_per_s": 14.0,
        "max_tokens_per_s": 16.0, "step_ms_median": 66.0, "repetitions": 3,
    }  # fmt: skip
    return {
        "label": "measured",
        "target": "cpu",
        "backend": "onnxruntime",
        "device": "some CPU",
        "weights": "random",
        "decode": {"image": decode, "tinychat": {**decode, "context": 4}},
        "contexts": [],
        "ttft_ms": {"preprocess": 10.0, "vision": 3000.0, "prefill": 5000.0, "total": 8010.0},
        "ttft_runs": 2,
        "prompt_tokens": 256,
        "asked_tokens": 128,
        "prefill_tokens_per_s": 51.2,
        "load_s": 4.0,
        "resident_after_load_bytes": 4_600_000_000,
        "resident_at_end_bytes": 4_700_000_000,
        "peak_memory_bytes": 4_800_000_000,
        "weight_bytes_per_token": 1_686_333_440,
        "cache_bytes_per_token": 655_360,
        "read_bandwidth_bytes_per_s": BANDWIDTH,
        "bandwidth_label": "measured",
        "bandwidth_readings": [BANDWIDTH],
        "roofline_fraction": share,
        "energy_joules": None,
        "others_before_cores": 0.0,
        "others_during_cores": 0.01,
        "stolen_cores": 0.0,
        "state": {"system": "Linux", "cores": "2", "clock_mhz": "2600"},
        "versions": {"vila-deploy": "0.1.0", "onnxruntime": "1.32.0"},
        "commit": "c0",
    }


@dataclass
class FakeWorker:
    """Records what it is asked for, moves the clock on, and raises `problems` by row title.

    `share` is the share of the bandwidth that each measured row reached, by precision, and
    `bandwidth` what the memory gave beside a row, by its title.
    """

    problems: dict[str, BaseException] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    bandwidth: dict[str, float] = field(default_factory=dict)
    seconds: float = MEASURE_S
    now: float = 0.0
    built: list[str] = field(default_factory=list)
    measured: list[Path] = field(default_factory=list)

    def build(
        self, model: str, precision: str, max_seq_len: int, out: Path, limit: TimeLimit
    ) -> None:
        self._spend(BUILD_S, limit)
        self.built.append(f"{model} {precision}")
        if problem := self.problems.get(f"{model} {precision}"):
            raise problem
        out.mkdir()

    def measure(self, engine: Path, settings: MeasureSettings, limit: TimeLimit) -> dict[str, Any]:
        self._spend(self.seconds, limit)
        assert engine.is_dir()
        self.measured.append(engine)
        title = self.built[-1] if self.built else "VILA1.5-3b int4"
        row = measured_row(share=self.share.get(title.split()[1], 0.5))
        return row | {"read_bandwidth_bytes_per_s": self.bandwidth.get(title, BANDWIDTH)}

    def _spend(self, needed: float, limit: TimeLimit) -> None:
        for _ in range(int(min(needed, limit.seconds, 1000))):
            limit.tick()
        self.now += min(needed, limit.seconds)
        if needed > limit.seconds:
            raise TimeUp


def fake_table(
    folder: Path,
    worker: FakeWorker,
    minutes: float = 60.0,
    rows: Sequence[TableRow] | None = None,
    free_bytes: int = 1 << 50,
    earlier_bandwidth: float | None = None,
    **identity: Any,
) -> Table:
    """Return a table of the authors' ten rows for the CPU.

    Args:
        identity: what differs from IDENTITY.
    """
    target = get_target("cpu")
    rows = table_rows(False, (), target) if rows is None else rows

    @contextmanager
    def scratch() -> Iterator[Path]:
        with TemporaryDirectory(prefix="work-", dir=folder) as work:
            yield Path(work)

    return Table(
        rows=rows,
        plans={row: plan_row(row, target) for row in rows if row.has_shapes},
        target=target,
        settings=MeasureSettings(),
        minutes=minutes,
        identity={**IDENTITY, **identity},
        rates=RATES,
        worker=worker,
        scratch=scratch,
        free_bytes=lambda: free_bytes,
        earlier_bandwidth=earlier_bandwidth,
        clock=lambda: worker.now,
    )


def results_file(folder: Path) -> ResultsFile:
    folder.mkdir(exist_ok=True)
    return ResultsFile(folder)
