"""Checkpoints whose head or tower is rounded as an engine rounds it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def rounded(weight: torch.Tensor, dtype: str, largest: int, grouped: bool = False) -> Doubles:
    """Return a head as it should be: a scale for each row in int8, for each 64 weights in int4.

    Args:
        grouped: a scale for each 64 weights in int8 too, as backend onnxruntime has it.
    """
    wide = weight.double().numpy()
    limit = largest if dtype == "int8" else 7
    by_row = dtype == "int8" and not grouped
    groups = wide[:, None] if by_row else wide.reshape(len(wide), -1, 64)
    scale = (np.abs(groups).max(-1, keepdims=True) / limit).astype(np.float16).astype(np.float64)
    values = np.clip(np.rint(groups / np.where(scale == 0, 1, scale)), -limit, limit)
    return (values * scale).reshape(wide.shape)


class Replaced:
    """A WeightSource with other values for some tensors."""

    def __init__(self, source: Any, tensors: dict[str, torch.Tensor]):
        self._source, self._tensors = source, tensors

    def tensor(self, name: str) -> torch.Tensor:
        replaced = self._tensors.get(name)
        return self._source.tensor(name) if replaced is None else replaced

    def linear(self, prefix: str) -> Any:
        replaced = self._tensors.get(f"{prefix}.weight")
        return self._source.linear(prefix) if replaced is None else replaced


def with_head(checkpoint: Any, dtype: str, largest: int, grouped: bool = False) -> Any:
    weight = checkpoint.llm.tensor("lm_head.weight")
    head = torch.from_numpy(rounded(weight, dtype, largest, grouped)).float()
    return SimpleNamespace(
        config=replace(checkpoint.config, llm=replace(checkpoint.config.llm)),
        llm=Replaced(checkpoint.llm, {"lm_head.weight": head}),
        vision=checkpoint.vision,
        projector=checkpoint.projector,
    )
