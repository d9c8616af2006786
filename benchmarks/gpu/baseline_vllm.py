"""Marlin and Machete out of a vLLM wheel's library, without vLLM's Python.

The library registers its operators with torch when it is loaded. SCHEMAS are those that this module
was written for, as vLLM 0.26.0 registers them; another version is left out and not guessed at.
"""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.baseline import (
    FOLDER,
    Baseline,
    Missing,
    Opened,
    Prepared,
    brought,
    needs_cuda,
    size_bytes,
)
from benchmarks.gpu.environment import Run
from vila_deploy.formats.base import QuantizedLinear

LIBRARY, VERSION = "vllm.so", "vllm-version.txt"
# vLLM's number for unsigned 4-bit integers without a bias: 4 bits of mantissa, IEEE's NaN.
UINT4 = 4 << 8 | 1 << 50
TILE, PACK = 16, 8
SCHEMAS = {
    "marlin_gemm": "_C::marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, "
    "Tensor? b_bias_or_none, Tensor b_scales, Tensor? a_scales, Tensor? global_scale, "
    "Tensor? b_zeros_or_none, Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, "
    "int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full, "
    "bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
    "machete_mm": "_C::machete_mm(Tensor A, Tensor B, int b_type, ScalarType? out_type, "
    "Tensor? group_scales, Tensor? group_zeros, int? group_size, Tensor? channel_scales, "
    "Tensor? token_scales, str? schedule) -> Tensor",
    "machete_prepack_B": "_C::machete_prepack_B(Tensor B, ScalarType a_type, int b_type, "
    "ScalarType? group_scales_type) -> Tensor",
}


def open_marlin(run: Run) -> Opened:
    """float16, runtime zero points, sums over K added in float32 as vLLM does by default."""
    needs_cuda(run)
    version = load("marlin_gemm")
    units = torch.cuda.get_device_properties(0).multi_processor_count
    return Opened(version, lambda linear: prepare_marlin(linear, units))


def open_machete(run: Run) -> Opened:
    needs_cuda(run)
    if run.capability != (9, 0):
        raise Missing(f"it runs on compute capability 9.0 only, this is {run.capability}")
    return Opened(load("machete_mm", "machete_prepack_B"), prepare_machete)


def load(*operators: str) -> str:
    """Load the library; return its version.

    Raises:
        Missing: it isn't there, doesn't load, or registers other operators than SCHEMAS.
    """
    path, version = unpacked(), brought(VERSION, "vllm").read_text("utf-8").strip()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{error.__cause__ or error}; it is {version}, this is torch {torch.__version__}"
        raise Missing(f"the library does not load: {reason}") from error
    check_schemas(*operators)
    return version


def check_schemas(*operators: str) -> None:
    """Raise Missing if an operator's arguments are called or ordered otherwise than in SCHEMAS."""
    for name in operators:
        operator = getattr(torch.ops._C, name, None)
        expected = _arguments(torch._C.parse_schema(SCHEMAS[name]))
        if operator is None or _arguments(operator.default._schema) != expected:
            has = operator and operator.default._schema
            raise Missing(f"the library is of another version: for {name} it has {has}")


def _arguments(schema: Any) -> list[str]:
    return [argument.name for argument in schema.arguments]


@cache
def unpacked() -> Path:
    """Return the library, unpacked beside its compressed form when it is first needed."""
    packed, path = FOLDER / f"{LIBRARY}.xz", FOLDER / LIBRARY
    if not path.exists():
        brought(packed.name, "vllm")
        partial = path.with_suffix(".partial")
        with lzma.open(packed) as source, partial.open("wb") as target:
            while chunk := source.read(1 << 24):
                target.write(chunk)
        partial.replace(path)
    return path


def prepare_marlin(linear: QuantizedLinear, units: int) -> Prepared:
    weight, scales, zeros = pack_marlin(linear)
    device = linear.q.device
    workspace = torch.zeros(units, dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    out, inner = linear.out_features, linear.in_features

    def call(x: Tensor) -> Tensor:
        # No bias, no scales of activations; no order of channels; K whole; no atomics.
        return torch.ops._C.marlin_gemm(
            x, None, weight, None, scales, None, None, zeros, nothing, nothing, workspace, UINT4,
            len(x), out, inner, True, False, True, False,
        )  # fmt: skip

    return Prepared(call, size_bytes(weight, scales, zeros))


def pack_marlin(linear: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Return Marlin's weight int32 [in/16, 2 · out], scales float16 and zero points int32.

    Tiles of 16 input by 64 output channels lie in the order in which the lanes of a warp hold the
    right operands of four 16 × 8 × 16 products twice; within a word even elements come first.
    """
    out, inner = linear.out_features, linear.in_features
    tiles = linear.q.T.reshape(inner // TILE, TILE, out // 64, 64).transpose(1, 2)
    order = _weight_order().to(linear.q.device)
    weight = _words(tiles.flatten(2)[..., order].flatten(1))
    scales = linear.scale.T.reshape(-1, 64)[:, _scale_order()].reshape(-1, out)
    zeros = linear.zero.T.reshape(-1, 64)[:, _scale_order()].reshape(-1, out)
    even_first = [0, 2, 4, 6, 1, 3, 5, 7]
    zeros = zeros.reshape(-1, out // PACK, PACK)[..., even_first].flatten(1)
    return weight, scales.contiguous(), _words(zeros)


def _weight_order() -> Tensor:
    """Return where each of the 1024 quantized values of a tile [16, 64] comes from."""
    lane, block, word = torch.arange(32), torch.arange(2), torch.arange(4)
    # Rows of the operand that a lane holds: a pair and the pair 8 below it.
    row = (2 * (lane % 4))[:, None] + torch.tensor([0, 1, 8, 9])
    column = (lane // 4)[:, None] + 8 * block
    # [lane, word, block, row]: word w is about the output channels from 16 w on.
    source = 64 * row[:, None, None, :] + column[:, None, :, None] + 16 * word[None, :, None, None]
    return source.reshape(-1, PACK)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()


def _scale_order() -> list[int]:
    return [i + 8 * j for i in range(8) for j in range(8)]


def _words(levels: Tensor) -> Tensor:
    """Return uint8 [rows, n] of 0..15 as int32 [rows, n / 8], the first in the lowest bits."""
    shifts = torch.arange(0, 32, 4, device=levels.device)
    wide = (levels.unflatten(1, (-1, PACK)).long() << shifts).sum(-1)
    return (wide - ((wide >> 31) << 32)).int()


def prepare_machete(linear: QuantizedLinear) -> Prepared:
    """Weights packed along K and reordered by the library; zero points times the scales."""
    # [in/8, out], neighbouring words of one output channel next to each other.
    packed = _words(linear.q).T
    weight = torch.ops._C.machete_prepack_B(packed, torch.float16, UINT4, torch.float16)
    scales = linear.scale.T.contiguous()
    zeros = (-scales * linear.zero.T.half()).contiguous()
    group = linear.group_size

    def call(x: Tensor) -> Tensor:
        return torch.ops._C.machete_mm(
            x, weight, UINT4, None, scales, zeros, group, None, None, None
        )

    return Prepared(call, size_bytes(weight, scales, zeros))


BASELINES = (Baseline("marlin int4", open_marlin), Baseline("machete int4", open_machete))
