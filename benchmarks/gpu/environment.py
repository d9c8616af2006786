"""The machine, and how rows are written."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import rows as rows_of
from vila_deploy.kernels.capability import ComputeCapability

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """One run: where it is, what it may take, and its rows as they come.

    `device` "cpu" is a rehearsal in Triton's interpreter: its times mean nothing.

    Args:
        small: tiny shapes, as every rehearsal has.
        stage: name of the stage that adds rows.
    """

    device: str
    capability: ComputeCapability
    limit_s: float
    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    small: bool = False
    stage: str | None = None

    @property
    def rehearsed(self) -> bool:
        return self.device == "cpu"

    @property
    def models(self) -> tuple[str, ...]:
        """Labels of the models to go through."""
        return ("3B",) if self.small else ("3B", "8B", "13B", "40B")

    def max_seq_len(self, at_true_shapes: int) -> int:
        """Return how many tokens caches hold."""
        return 32 if self.small else at_true_shapes

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.start)

    def add(self, kind: str, name: str, **values: Any) -> None:
        """Append a row to the file at once, so that an interrupted run keeps what it has.

        A figure whose kernels a check has found wrong gets `agrees` False and their names.
        """
        label = "rehearsed" if self.small else "measured"
        if kind in rows_of.TIMED and (wrong := rows_of.disagreeing(self.rows, kind, name)):
            values |= {"agrees": False, "disagreeing": wrong}
        row = {"kind": kind, "name": name, "label": label, "stage": self.stage, **values}
        row |= self._about
        self.rows.append(row)
        rows_of.append(self.out, row)
        shown = {k: _short(v) for k, v in values.items()}
        print(f"{kind:8} {name:34} {shown}", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Make a failure inside a row of kind `failed`, and go on."""
        try:
            yield
        except Exception as error:
            self.add("failed", name, reason=reason_of(error))

    def __post_init__(self) -> None:
        import torch
        import triton

        self.small = self.small or self.rehearsed
        if not self.rows:
            self.rows += rows_of.read(self.out)
        name = platform.processor() or platform.machine()
        if not self.rehearsed:
            name = torch.cuda.get_device_name()
        self._about = {
            "device": name,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "driver": driver(),
            },
            "commit": commit(),
        }


def reason_of(error: Exception) -> str:
    """Return one line for a row."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def driver() -> str | None:
    """Return the version of NVIDIA's driver, None where there is none."""
    version = Path("/sys/module/nvidia/version")
    if version.exists():
        return version.read_text().strip()
    return first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str | None:
    """Return VILA_DEPLOY_COMMIT, for a copy without its history, else the checkout's commit."""
    found = os.environ.get("VILA_DEPLOY_COMMIT")
    return found or first_line("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")


def first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]
