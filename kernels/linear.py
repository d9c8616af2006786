"""y = x Wᵀ + bias for any number of tokens, each by the kernel that suits it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.dequantize import dequantize
from vila_deploy.kernels.gemm import gemm
from vila_deploy.kernels.gemv import gemv
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_linear import PackedLinear
from vila_deploy.kernels.tile_config import TOKENS, widest_gemm


@dataclass(frozen=True)
class DenseProduct:
    """y = x Wᵀ + bias of a float16 matrix [out, in], by cuBLAS; a call allocates nothing."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    y: Tensor

    def __call__(self) -> None:
        dense = self.weight.T
        if self.y.dtype == torch.float16:
            if self.bias is None:
                torch.mm(self.x, dense, out=self.y)
            else:
                torch.addmm(self.bias, self.x, dense, out=self.y)
            return
        if self.x.is_cuda:
            torch.mm(self.x, dense, out_dtype=self.y.dtype, out=self.y)
        else:  # torch has no product with an `out_dtype` on a CPU
            torch.mm(self.x.to(self.y.dtype), dense.to(self.y.dtype), out=self.y)
        if self.bias is not None:
            self.y.add_(self.bias)


Call = Launch | DenseProduct


def is_dense(tokens: int, weight: PackedLinear, capability: ComputeCapability) -> bool:
    """Return whether a product of so many tokens goes through the weight as a float16 matrix."""
    return tokens > widest_gemm(capability) and weight.bits < 16


def product_calls(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor,
    capability: ComputeCapability, dense: Tensor | None = None,
) -> list[Call]:  # fmt: skip
    """Return what fills `y` = x Wᵀ + bias, which is summed in float32.

    Up to `widest_gemm` tokens the bits of a row don't depend on how many others there are; beyond,
    cuBLAS chooses its order of additions by the shape.

    Args:
        x: float16 [tokens, in].
        bias: float32 [out] or None.
        y: float16 [tokens, out], or float32 for what float16 may not hold.
        dense: float16 [at least out · in], to be overwritten, where `is_dense`.
    """
    if not is_dense(len(x), weight, capability):
        return [product(x, weight, bias, y, capability)]
    assert dense is not None
    matrix = dense[: weight.out_features * weight.in_features].view(weight.out_features, -1)
    added = None if bias is None else bias.to(y.dtype)
    return [dequantize(weight, matrix), DenseProduct(x, matrix, added, y)]


def linear(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, capability: ComputeCapability,
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """Return x Wᵀ + bias [tokens, out] as `dtype`; arguments as for `product_calls`."""
    y = x.new_empty((len(x), weight.out_features), dtype=dtype)
    dense = None
    if is_dense(len(x), weight, capability):
        dense = x.new_empty(weight.out_features * weight.in_features)
    for call in product_calls(x, weight, bias, y, capability, dense):
        call()
    return y


def product(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor, capability: ComputeCapability
) -> Launch:
    """Return a launch that fills `y`, by the kernel for this number of tokens."""
    return (gemv if len(x) <= TOKENS else gemm)(x, weight, bias, y, capability)
