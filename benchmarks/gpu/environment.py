"""The machine, and how rows are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila_deploy.kernels.capability import ComputeCapability

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Run:
    """One run: where it is, what it may take, and its rows as they come.

    `device` "cpu" is a rehearsal in Triton's interpreter: its times mean nothing.
    """

    device: str
    capability: ComputeCapability
    limit_s: float
    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def rehearsed(self) -> bool:
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.start)

    def add(self, kind: str, name: str, **values: Any) -> None:
        """Append a row to the file at once, so that an interrupted run keeps what it has."""
        label = "rehearsed" if self.rehearsed else "measured"
        row = {"kind": kind, "name": name, "label": label, **values, **self._about}
        self.rows.append(row)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
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
