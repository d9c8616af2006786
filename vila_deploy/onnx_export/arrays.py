"""Convert tensors of a checkpoint to the numpy arrays that graphs hold."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_deploy.formats.base import to_float16


def float16(tensor: Tensor, name: str) -> NDArray[np.float16]:
    """Return `tensor` in float16.

    Raises:
        VilaDeployError: a value is too large for float16.
    """
    return to_float16(tensor, name).numpy()


def float32(tensor: Tensor) -> NDArray[np.float32]:
    """Return `tensor` in float32, exactly."""
    return tensor.to(torch.float32).numpy()
