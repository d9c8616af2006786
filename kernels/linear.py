"""y = x Wᵀ + bias for any number of tokens, each by the kernel that suits it."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.dequantize import dequantize
from vila_deploy.kernels.gemm import gemm
from vila_deploy.kernels.gemv import gemv
from vila_deploy.kernels.packed_linear import PackedLinear
from vila_deploy.kernels.tile_config import TOKENS, widest_gemm


def linear(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, capability: ComputeCapability
) -> Tensor:
    """Return x Wᵀ + bias, float16 [tokens, out].

    Args:
        x: float16 [tokens, in].
        bias: float32 [out] or None.
    """
    tokens = x.shape[0]
    if tokens > widest_gemm(capability) and weight.bits < 16:
        dense = x.new_empty((weight.out_features, weight.in_features))
        dequantize(weight, dense)()
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.half())
    y = x.new_empty((tokens, weight.out_features))
    (gemv if tokens <= TOKENS else gemm)(x, weight, bias, y, capability)()
    return y
