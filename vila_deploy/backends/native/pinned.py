"""Page-locked host memory, which the GPU reads by itself."""

from __future__ import annotations

from torch import Tensor


def pinned(tensor: Tensor, device: str) -> Tensor:
    """Return it in host memory that `device` can read; in the interpreter any memory is."""
    return tensor.cpu() if device == "cpu" else tensor.cpu().pin_memory()
