"""Convert tensors of a checkpoint to the numpy arrays that graphs hold."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_deploy.utils.errors import VilaDeployError

FLOAT16_MAX = torch.finfo(torch.float16).max


def float16(tensor: Tensor, name: str) -> NDArray[np.float16]:
    """Return `tensor` in float16.

    Raises:
        VilaDeployError: a value is too large for float16.
    """
    if tensor.dtype != torch.float16 and tensor.abs().max() > FLOAT16_MAX:
        raise VilaDeployError(
            f"holds values beyond {FLOAT16_MAX:.0f}, the largest of float16",
            where=name,
            fix="use a checkpoint whose weights fit into float16",
        )
    return tensor.to(torch.float16).numpy()


def float32(tensor: Tensor) -> NDArray[np.float32]:
    """Return `tensor` in float32, exactly."""
    return tensor.to(torch.float32).numpy()
