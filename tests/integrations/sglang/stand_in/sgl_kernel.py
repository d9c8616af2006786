"""Stands in for SGLang's compiled kernels, which exist for GPUs and AMX only.

Names exist and calling one fails, but for AWQ's dequantization, which is done in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def awq_dequantize(qweight: Tensor, scales: Tensor, qzeros: Tensor) -> Tensor:
    """Return the weight [in, out] of AutoAWQ's GEMM packing."""
    values, zeros = _unpacked(qweight), _unpacked(qzeros)
    group = values.shape[0] // scales.shape[0]
    zeros, scales = (each.repeat_interleave(group, 0) for each in (zeros, scales))
    return (values - zeros).to(scales.dtype) * scales


def _unpacked(packed: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & 15)[..., ORDER].flatten(-2)


# SGLang registers the operator for CUDA.
_library = torch.library.Library("sglang", "IMPL")
_library.impl("awq_dequantize", awq_dequantize, "CPU")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}")

    return missing
