"""The compute capability that engines of a target are compiled for."""

from __future__ import annotations

from vila_deploy.engine.target import Target
from vila_deploy.kernels.capability import ComputeCapability


def capability_of(target: Target) -> ComputeCapability:
    """Return the compute capability of a target that has a GPU."""
    assert target.compute_capability is not None
    return ComputeCapability.parse(target.compute_capability)
