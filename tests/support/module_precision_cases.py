"""Checkpoints whose head or tower is rounded as an engine rounds it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def rounded(weight: torch.Tensor, dtype: str, largest: int) -> Doubles:
    """Return a head as it should be: a scale for each row in int8, for each 64 weights in int4."""
    wide = weight.double().numpy()
    if dtype == "int8":
        groups, limit = wide[:, None], largest
    else:
        groups, limit = wide.reshape(len(wide), -1, 64), 7
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


def with_head(checkpoint: Any, dtype: str, largest: int) -> Any:
    weight = checkpoint.llm.tensor("lm_head.weight")
    head = torch.from_numpy(rounded(weight, dtype, largest)).float()
    return SimpleNamespace(
        config=replace(checkpoint.config, llm=replace(checkpoint.config.llm)),
        llm=Replaced(checkpoint.llm, {"lm_head.weight": head}),
        vision=checkpoint.vision,
        projector=checkpoint.projector,
    )
