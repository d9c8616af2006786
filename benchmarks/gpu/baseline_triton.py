"""Baselines that need no library of their own: torch's int4 product, GemLite and Humming."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.baseline import (
    Baseline,
    Missing,
    Opened,
    Prepared,
    needs_cuda,
    size_bytes,
    use_packages,
)
from benchmarks.gpu.environment import Run
from vila_deploy.formats.awq import AWQ_GEMM
from vila_deploy.formats.base import SYMMETRIC_ZERO, QuantizedLinear

# Tiles of 16 channels along K that torch's operator packs together; the largest it has.
INNER_TILES = 8


def open_tinygemm(run: Run) -> Opened:
    """torch's operator: bfloat16, w = (q − 8) · scale + zero with both in bfloat16."""
    prepare = _prepare_on_cpu if run.rehearsed else _prepare_on_cuda
    return Opened(f"torch {torch.__version__}", prepare)


def _prepare_on_cuda(linear: QuantizedLinear) -> Prepared:
    pairs = linear.q[:, ::2] << 4 | linear.q[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    scales, group = _scales_and_zeros(linear), linear.group_size

    def call(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)

    return Prepared(call, size_bytes(packed, scales), torch.bfloat16)


def _prepare_on_cpu(linear: QuantizedLinear) -> Prepared:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(linear.q.int(), INNER_TILES)
    scales, group = _scales_and_zeros(linear), linear.group_size

    def call(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)

    return Prepared(call, size_bytes(packed, scales), torch.bfloat16)


def _scales_and_zeros(linear: QuantizedLinear) -> Tensor:
    """Return scales and zero points, bfloat16 [groups, out, 2]."""
    scale = linear.scale.float()
    zero = scale * (SYMMETRIC_ZERO - linear.zero.float())
    return torch.stack([scale.T, zero.T], 2).bfloat16().contiguous()


def open_gemlite(run: Run) -> Opened:
    """Triton kernels, float16, with the settings that GemLite ships for the GPU."""
    needs_cuda(run)
    use_packages()
    try:
        import gemlite
        from gemlite.helper import A16W4_HQQ_INT
    except ImportError as error:
        raise Missing(f"{error}; run `python -m benchmarks.gpu.get_baselines gemlite`") from error

    def prepare(linear: QuantizedLinear) -> Prepared:
        packer = A16W4_HQQ_INT(device=run.device, dtype=torch.float16)
        layer = packer.from_weights(linear.q, linear.scale, linear.zero.half())
        return Prepared(layer, size_bytes(layer.W_q, layer.scales, layer.zeros))

    return Opened(f"gemlite {gemlite.__version__}", prepare)


def open_humming(run: Run) -> Opened:
    """Kernels that nvcc compiles for each shape as they are first used; weights as AutoAWQ's."""
    needs_cuda(run)
    use_packages()
    try:
        import humming
        from humming.layer import HummingLayer
    except ImportError as error:
        raise Missing(f"{error}; run `python -m benchmarks.gpu.get_baselines humming`") from error

    def prepare(linear: QuantizedLinear) -> Prepared:
        asked = {
            "quant_method": "awq", "bits": 4, "group_size": linear.group_size, "zero_point": True
        }  # fmt: skip
        layer = HummingLayer(
            shape_n=linear.out_features, shape_k=linear.in_features, weight_config=asked,
            torch_dtype=torch.float16,
        ).to(run.device)  # fmt: skip
        layer.load_from_tensors(AWQ_GEMM.pack(linear))
        layer.transform()
        held = [parameter for _, parameter in layer.named_parameters()]
        return Prepared(layer, size_bytes(*held))

    return Opened(f"humming-kernels {humming.__version__}", prepare)


BASELINES = (
    Baseline("tinygemm int4", open_tinygemm),
    Baseline("gemlite int4", open_gemlite),
    Baseline("humming int4", open_humming),
)
