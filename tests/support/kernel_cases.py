"""Random inputs for kernels, which run in Triton's interpreter (tests/unit/conftest.py)."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime import interpreter

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.presets import PRESETS, preset
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_linear import PackedLinear, pack_float, pack_int4, pack_int8, unpack
from vila_deploy.kernels.tile_config import TOKENS

CAPABILITY = ComputeCapability(9, 0)
EPSILON = 1e-5


def model_table() -> list[LlmConfig]:
    """The language model of every model of the table."""
    return [preset(name, "int4").llm for name in PRESETS]


def run_program(launch: Launch, *index: int) -> None:
    """Run only the program of the grid that has this index."""
    builder = interpreter.interpreter_builder
    kind = type(builder)
    program, grid = ([*numbers, 0, 0][:3] for numbers in (index, launch.grid))
    grid = [max(size, 1) for size in grid]
    builder.set_grid_dim = lambda *_: kind.set_grid_dim(builder, *grid)
    builder.set_grid_idx = lambda *_: kind.set_grid_idx(builder, *program)
    try:
        launch.kernel[(1,)](**launch.args, **launch.constants)
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_int4(
    out_features: int, in_features: int, group: int, random: torch.Generator
) -> QuantizedLinear:
    """Quantized values and zero points over their whole range, scales a factor of 20 apart."""
    groups = (out_features, in_features // group)
    return QuantizedLinear(
        torch.randint(0, 16, (out_features, in_features), generator=random, dtype=torch.uint8),
        (torch.rand(groups, generator=random) * 0.02 + 0.001).half(),
        torch.randint(0, 16, groups, generator=random, dtype=torch.uint8),
    )


def random_packed(
    out_features: int, in_features: int, bits: int, random: torch.Generator, group: int = 128
) -> PackedLinear:
    if bits == 4:
        return pack_int4(random_int4(out_features, in_features, group, random))
    weight = torch.randn((out_features, in_features), generator=random) / in_features**0.5
    return pack_int8(weight) if bits == 8 else pack_float(weight)


def halves(rows: int, columns: int, random: torch.Generator) -> Tensor:
    return torch.randn((rows, columns), generator=random).half()


def unwritten(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A buffer in which every element that is not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def squares_of(residual: Tensor, programs: int) -> Tensor:
    """Sums of squares [programs, 8] of a residual [tokens, hidden], as `add_residual` has them."""
    sums = torch.zeros(programs, TOKENS)
    shares = residual.float().square().tensor_split(programs, 1)
    sums[:, : len(residual)] = torch.stack([share.sum(1) for share in shares])
    return sums


def plain(x: Tensor, weight: PackedLinear) -> Tensor:
    """The plain float16 computation."""
    return torch.nn.functional.linear(x.half(), unpack(weight).half())


def error(found: Tensor, reference: Tensor) -> float:
    assert found.shape == reference.shape
    assert torch.isfinite(found).all()
    return float((found.float() - reference).norm() / reference.norm())


def assert_exact_as_half(found: Tensor, reference: Tensor, half: Tensor) -> None:
    """The error against float32 is at most twice that of plain float16 arithmetic."""
    assert error(found, reference) <= 2 * error(half, reference)
