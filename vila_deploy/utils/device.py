"""Choose where a quantization runs: the GPU if there is one with room, else the CPU."""

from __future__ import annotations

import os
import sys

import torch

from vila_deploy.utils.errors import VilaDeployError

CPU = torch.device("cpu")


def choose_device(name: str, needed_bytes: int) -> torch.device:
    """Return the device for `name`: "cpu", "cuda" or "auto".

    What lies on the GPU at one time is at most what the plan counts for the host: decoder layer,
    Hessians and a chunk of the activations. Results are those of the CPU within rounding; on one
    device they repeat bit for bit.

    Raises:
        VilaDeployError: "cuda" was asked for, and there is none or it has no room.
    """
    if name == "cpu":
        return CPU
    problem = _problem(needed_bytes)
    if problem is None:
        # Sums in one order; cuBLAS reads the variable when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        return torch.device("cuda")
    if name == "cuda":
        raise VilaDeployError(problem, where="--device cuda", fix="use --device cpu")
    if torch.cuda.is_available():
        print(f"quantizing on the CPU: the GPU {problem}", file=sys.stderr)
    return CPU


def _problem(needed_bytes: int) -> str | None:
    """Return why the GPU can't be used; None if it can."""
    if not torch.cuda.is_available():
        return "finds no GPU that this torch can use"
    free, _ = torch.cuda.mem_get_info()
    if free < needed_bytes:
        return f"has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed"
    return None
