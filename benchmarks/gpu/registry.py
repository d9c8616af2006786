"""From a stage's name to its function, whose module is imported only then."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from benchmarks.gpu.environment import Run
from benchmarks.gpu.plan import STAGES


def load_stage(name: str) -> Callable[[Run], None]:
    """Import the function of a stage."""
    module, _, function = STAGES[name].function.partition(":")
    found: Callable[[Run], None] = getattr(import_module(f"benchmarks.gpu.{module}"), function)
    return found
