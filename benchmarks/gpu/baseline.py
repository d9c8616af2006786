"""What a baseline is: an int4 product prepared from given weights, checked, and only then timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.environment import Run
from benchmarks.gpu.folders import BASELINES
from benchmarks.gpu.inputs import Q_SPREAD
from vila_deploy.formats.base import QuantizedLinear

FOLDER = BASELINES
# Python packages within it.
PACKAGES = FOLDER / "python"
GROUP = 128
# ‖found − reference‖ / ‖reference‖ against float32. Sums in float16 or inputs in bfloat16 stay
# well below; a weight in another order is at 1.
LIMIT = 2e-2


class Missing(Exception):
    """A baseline can't be measured here; the message says why, and what would change that."""


@dataclass(frozen=True)
class Prepared:
    """One weight in a baseline's own form.

    Args:
        call: x [tokens, in] of type `dtype` → [tokens, out].
        size_bytes: what one pass over the weight reads.
    """

    call: Callable[[Tensor], Tensor]
    size_bytes: int
    dtype: torch.dtype = torch.float16


@dataclass(frozen=True)
class Opened:
    """A baseline that is here: its version, and what brings a weight into its form."""

    version: str
    prepare: Callable[[QuantizedLinear], Prepared]


@dataclass(frozen=True)
class Baseline:
    """A row of the benchmark: `open` raises Missing where it can't run; `heads` take lm_head."""

    name: str
    open: Callable[[Run], Opened]
    heads: bool = False


def random_quantized(out_features: int, in_features: int, device: str) -> QuantizedLinear:
    """Return a random weight in groups of GROUP, with zero points, of about unit gain."""
    groups = (out_features, in_features // GROUP)
    q = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    scale = (0.75 + torch.rand(groups, device=device) / 2) * in_features**-0.5 / Q_SPREAD
    zero = torch.randint(6, 10, groups, dtype=torch.uint8, device=device)
    return QuantizedLinear(q, scale.half(), zero)


def error_of(found: Tensor, x: Tensor, weight: Tensor) -> float:
    """Return the relative error of a product of x [tokens, in] and float32 weight [out, in]."""
    if found.shape != (len(x), len(weight)) or not bool(torch.isfinite(found.float()).all()):
        return float("inf")
    expected = x.float() @ weight.T
    return float((found.float() - expected).norm() / expected.norm())


def size_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def needs_cuda(run: Run) -> None:
    if run.rehearsed:
        raise Missing("it runs on CUDA GPUs only")


def brought(name: str, kind: str) -> Path:
    """Return a file or folder that get_baselines.py puts into FOLDER.

    Raises:
        Missing: it isn't there.
    """
    path = FOLDER / name
    if not path.exists():
        raise Missing(f"run `python -m benchmarks.gpu.get_baselines {kind}` first")
    return path


def use_packages() -> None:
    """Make what get_baselines.py brought importable, behind the packages that are installed."""
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
