"""Activations that exceed float16, divided by a power of two for a product."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_INPUT = 32752.0  # half of the largest float16


def fit_into_float16(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 `values` [tokens, n] as float16, and what to multiply each row by [tokens, 1].

    That is 1, or a power of two where a value exceeds float16: a few activations of trained models
    do ("massive activations", arXiv:2402.17762).
    """
    largest = torch.maximum(values.amax(1, keepdim=True), -values.amin(1, keepdim=True))
    exponent = (largest / LARGEST_INPUT).log2().ceil().clamp(min=0)
    scale = exponent.exp2()
    return (values / scale).half(), scale
