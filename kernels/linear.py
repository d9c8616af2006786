"""y = x Wᵀ + bias for any number of tokens, each by the kernel that suits it."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.dequantize import dequantize
from vila_deploy.kernels.gemm import gemm
from vila_deploy.kernels.gemv import gemv
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_linear import PackedLinear
from vila_deploy.kernels.tile_config import TOKENS, widest_gemm


def linear(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, capability: ComputeCapability,
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """Return x Wᵀ + bias [tokens, out], which is summed in float32, as `dtype`.

    Up to `widest_gemm` tokens the bits of a row don't depend on how many others there are; beyond,
    cuBLAS chooses its order of additions by the shape.

    Args:
        x: float16 [tokens, in].
        bias: float32 [out] or None.
        dtype: float16, or float32 for what float16 may not hold.
    """
    tokens = x.shape[0]
    if tokens > widest_gemm(capability) and weight.bits < 16:
        dense = x.new_empty((weight.out_features, weight.in_features))
        dequantize(weight, dense)()
        return _dense_linear(x, dense, bias, dtype)
    y = x.new_empty((tokens, weight.out_features), dtype=dtype)
    product(x, weight, bias, y, capability)()
    return y


def product(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor, capability: ComputeCapability
) -> Launch:
    """Return a launch that fills `y`, by the kernel for this number of tokens."""
    return (gemv if len(x) <= TOKENS else gemm)(x, weight, bias, y, capability)


def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float16:
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.half())
    # torch has no product with an `out_dtype` on a CPU.
    dense = weight.T
    y = torch.mm(x, dense, out_dtype=dtype) if x.is_cuda else x.to(dtype) @ dense.to(dtype)
    return y if bias is None else y + bias
