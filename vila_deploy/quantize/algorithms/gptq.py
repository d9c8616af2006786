"""GPTQ: round channel by channel, correcting the channels that follow, then refine.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, with a clipping ratio searched per group, the
channels ordered by falling mean square (act order), and, after rounding, least-squares scale refits
and coordinate descent on the quantized values in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.formats.base import QuantizedLinear, QuantScheme, to_float16
from vila_deploy.formats.rtn import check_scale, quantize_clipped
from vila_deploy.quantize.algorithms.hessian import HessianFactor
from vila_deploy.quantize.algorithms.output_hessian import OutputFactor
from vila_deploy.utils.limits import ROWS_AT_A_TIME, SOLVE_BYTES, TILE_ROWS

# Shares of a group's range that are tried. Above 1 pays off where the ends matter least.
CLIPPING_RATIOS = tuple(1.05 - 0.05 * step for step in range(11))
# Tried on top of the best ratio where there are zero points, so that the two ends of a range are
# clipped by different shares.
SCALE_FACTORS, ZERO_SHIFTS = (1.0, 0.9, 0.95, 1.05), (-1, 0, 1)
# Weights that stay in a processor's cache from one clipping ratio to the next.
SEARCHED_NUMBERS = 1 << 18
REFINEMENTS = 3
# A refitted scale further away belongs to a group that hardly matters; the old one is safer.
MAX_REFIT_FACTOR = 2.0
# Channels that are rounded one by one before their errors reach the rest of a block, and steps that
# make a block. A block takes the errors before it in one product: wider ones are faster where no
# cache holds the rest.
STEP = 64
BLOCK_STEPS, BLOCK_FROM = 8, 2048
# Channels in a product of TILE_ROWS columns whose result a processor keeps in its cache.
TILE_CHANNELS = 1024
# Rows of a head that are quantized together.
HEAD_ROWS = 8


@dataclass
class _Rows:
    """Some output rows, channels first so that one channel is contiguous.

    Args:
        weight: float32 [in, rows], what the quantized weight should be.
        qweight: quantized values, float32 [in, rows].
        scale, zero_point: float32 [in/group, rows].
        max_value: the largest quantized value.
    """

    weight: Tensor
    qweight: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int
    max_value: int

    def grid(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each weight in `channels` [n, rows]."""
        groups = channels // self.group_size
        return self.scale[groups], self.zero_point[groups]


def gptq_quantize(
    weight: Tensor,
    factor: HessianFactor,
    scheme: QuantScheme,
    name: str,
    bias: Tensor | None = None,
    outputs: OutputFactor | None = None,
) -> QuantizedLinear:
    """Return float32 `weight` [out, in] quantized with the least output error under the Hessian.

    Args:
        outputs: the factor of its output Hessian; None: all outputs are equally important.

    Raises:
        VilaDeployError: a scale or the bias does not fit into float16.
    """
    if outputs is None:
        parts = [_quantize_rows(rows, factor, scheme) for rows in weight.split(ROWS_AT_A_TIME)]
    else:
        parts = [_quantize_heads(weight, factor, scheme, outputs)]
    scale = torch.cat([scale for _, scale, _ in parts], 1).T
    check_scale(scale, weight, name)
    return QuantizedLinear(
        q=torch.cat([qweight for qweight, _, _ in parts]),
        scale=scale.to(torch.float16).contiguous(),
        zero=torch.cat([zero for _, _, zero in parts], 1).T.to(torch.uint8).contiguous(),
        bias=None if bias is None else to_float16(bias, f"{name}.bias"),
        bits=scheme.bits,
    )


def _quantize_heads(
    weight: Tensor, factor: HessianFactor, scheme: QuantScheme, outputs: OutputFactor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_quantize_rows` does, each row corrected for the errors of rows before it.

    That is GPTQ along the outputs as well: a few rows of each head are quantized at a time, towards
    weights that make up for the head's rows before them as far as the output Hessian tells.
    """
    heads, head_dim = outputs.order.shape
    weights = weight[outputs.order]
    errors, qweight = torch.empty_like(weights), weights.new_empty(weights.shape, dtype=torch.uint8)
    grids = weights.new_empty(2, weight.shape[1] // scheme.group_size, heads, head_dim)
    for rows in _spans(slice(0, head_dim), HEAD_ROWS):
        target = weights[:, rows]
        if rows.start:
            before = slice(0, rows.start)
            # Of a block of rows, none is corrected for another.
            passed_on = torch.linalg.solve_triangular(
                outputs.u[:, rows, rows],
                outputs.u[:, before, rows],
                upper=True,
                left=False,
                unitriangular=True,
            )
            target = target + passed_on.mT @ errors[:, before]
        q, scale, zero = _quantize_rows(target.flatten(0, 1), factor, scheme)
        stored = _dequantize(q, scale, zero, scheme.group_size).unflatten(0, (heads, -1))
        errors[:, rows] = weights[:, rows] - stored
        qweight[:, rows] = q.unflatten(0, (heads, -1))
        grids[:, :, :, rows] = torch.stack([scale, zero]).unflatten(2, (heads, -1))
    inverse = outputs.order.flatten().argsort()
    scale, zero = grids.flatten(2)[:, :, inverse]
    return qweight.flatten(0, 1)[inverse], scale, zero


def _dequantize(qweight: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """Return the weights [rows, in] that are stored, given `_quantize_rows`' results."""
    centred = qweight.unflatten(1, (-1, group_size)).float() - zero.T[..., None]
    return (centred * scale.to(torch.float16).float().T[..., None]).flatten(1)


def _quantize_rows(
    weight: Tensor, factor: HessianFactor, scheme: QuantScheme
) -> tuple[Tensor, Tensor, Tensor]:
    """Return qweight uint8 [rows, in]; scale and zero point float32 [in/group, rows]."""
    on_cpu = weight.device.type == "cpu"
    row_count = max(1, SEARCHED_NUMBERS // weight.shape[1]) if on_cpu else len(weight)
    grids = [_search_clipping(part, factor, scheme) for part in weight.split(row_count)]
    scale, zero_point = (torch.cat(parts) for parts in zip(*grids, strict=True))
    transposed = weight.T.contiguous()
    rows = _Rows(
        transposed,
        transposed,
        scale.T.contiguous(),
        zero_point.T.contiguous(),
        scheme.group_size,
        scheme.max_value,
    )
    rows.qweight = _round_channels(rows, factor)
    hessian_weight = factor.hessian @ rows.weight
    for _ in range(REFINEMENTS):
        rows.scale = _refit_scales(rows, factor.hessian, hessian_weight)
        rows.qweight = _coordinate_descent(rows, factor.hessian)
    rows.scale = _refit_scales(rows, factor.hessian, hessian_weight)
    # Kept until all rows are done, so in as little memory as possible.
    return rows.qweight.to(torch.uint8).T.contiguous(), rows.scale, rows.zero_point


def _search_clipping(
    weight: Tensor, factor: HessianFactor, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point [out, in/group] that clip each group with the least error.

    The error is that expected of GPTQ: squares of the rounding errors, weighted by d.
    """
    groups = weight.unflatten(1, (-1, scheme.group_size))
    search = _GridSearch(groups, factor.d.unflatten(0, (-1, scheme.group_size)))
    for ratio in CLIPPING_RATIOS:
        search.offer(*quantize_clipped(groups, scheme, ratio))
    if not scheme.symmetric:
        best_scale, best_zero = search.scale, search.zero
        for scale_factor, shift in itertools.product(SCALE_FACTORS, ZERO_SHIFTS):
            scale = (best_scale * scale_factor).to(torch.float16).float()
            zero = (best_zero + shift).clamp_(0, scheme.max_value)
            q = groups.div(scale).round_().add_(zero).clamp_(0, scheme.max_value)
            search.offer(q, scale, zero)
    return search.scale.squeeze(-1), search.zero.squeeze(-1)


class _GridSearch:
    """Keeps the best scale and zero point [out, in/group, 1] of each group.

    Args:
        groups: weights [out, in/group, group].
        importance: of the square of each channel's rounding error [in/group, group].
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, groups: Tensor, importance: Tensor):
        self._groups, self._importance = groups, importance
        self._least: Tensor | None = None

    def offer(self, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Take scale and zero point where `q`, which is used up, has a smaller error."""
        lost = q.sub_(zero).mul_(scale).sub_(self._groups).square_()
        error = torch.einsum("ogc,gc->og", lost, self._importance)[..., None]
        if self._least is None:
            self._least, self.scale, self.zero = error, scale, zero
            return
        better = error < self._least
        self._least = torch.where(better, error, self._least)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)


def _round_channels(rows: _Rows, factor: HessianFactor) -> Tensor:
    """Return qweight [in, rows]: GPTQ proper, each channel corrected for the errors before it."""
    u = factor.u.T
    errors, qweight = torch.empty_like(rows.weight), torch.empty_like(rows.weight)
    for block in _spans(slice(0, len(qweight)), _block_size(len(qweight))):
        block_target = rows.weight[factor.order[block]]
        if block.start:
            block_target.addmm_(u[block, : block.start], errors[: block.start])
        for span in _spans(block, STEP):
            channels = factor.order[span]
            weight, (scale, zero) = rows.weight[channels], rows.grid(channels)
            target = block_target[span.start - block.start :][: len(weight)]
            if span.start > block.start:
                before = slice(block.start, span.start)
                target.addmm_(u[span, before], errors[before])
            u_span, error, rounded = u[span, span].contiguous(), errors[span], zero.clone()
            for channel, channel_target in enumerate(target):
                if channel:
                    channel_target.addmv_(error[:channel].T, u_span[channel, :channel])
                q = rounded[channel].add_(channel_target.div(scale[channel]).round_())
                q.clamp_(0, rows.max_value)
                error[channel] = weight[channel] - (q - zero[channel]) * scale[channel]
            qweight[channels] = rounded
    return qweight


def _block_size(channels: int) -> int:
    return STEP * BLOCK_STEPS if channels > BLOCK_FROM else STEP


def _spans(channels: slice, size: int) -> Iterator[slice]:
    """Yield parts of `size` of a range of channels."""
    for start in range(channels.start, channels.stop, size):
        yield slice(start, min(start + size, channels.stop))


def _refit_scales(rows: _Rows, hessian: Tensor, hessian_weight: Tensor) -> Tensor:
    """Return the least-squares scales [in/group, rows] for the quantized values as they are.

    For a row with centred values v, the scales s of its groups solve A s = b with
    A_gh = v_g · H_gh · v_h and b_g = v_g · H_g · w.

    Args:
        hessian_weight: H · weight [in, rows].
    """
    size, (groups, count) = rows.group_size, rows.scale.shape
    row_count = max(1, min(TILE_ROWS, SOLVE_BYTES // (groups * groups * 8)))
    scale = torch.empty_like(rows.scale)
    for begin in range(0, count, row_count):
        part = slice(begin, begin + row_count)
        centred = rows.qweight[:, part] - rows.zero_point[:, part].repeat_interleave(size, 0)
        right_side = (hessian_weight[:, part] * centred).unflatten(0, (groups, size)).sum(1).T
        old = rows.scale[:, part].T.double()
        matrix = _normal_equations(centred, hessian, size).double()
        stored = _solve(matrix, right_side.double(), old).to(torch.float16).double()
        near = (stored > old / MAX_REFIT_FACTOR) & (stored < old * MAX_REFIT_FACTOR)
        scale[:, part] = torch.where(near, stored, old).T
    return scale


def _normal_equations(centred: Tensor, hessian: Tensor, size: int) -> Tensor:
    """Return A of `_refit_scales` [rows, groups, groups] for `centred` values [in, rows]."""
    channels, count = centred.shape
    groups = channels // size
    on_cpu = centred.device.type == "cpu"
    tile = (TILE_CHANNELS // size * size or size) if on_cpu else channels
    matrix = centred.new_empty(groups, groups, count)
    product = centred.new_empty(tile, count)
    for begin in range(0, channels, size):
        group, here = begin // size, slice(begin, begin + size)
        # A is symmetric, so the groups before this one have their share already.
        for first in range(begin, channels, tile):
            there = slice(first, min(first + tile, channels))
            spread = product[: there.stop - first]
            torch.mm(hessian[there, here], centred[here], out=spread).mul_(centred[there])
            sums = matrix[group, first // size : there.stop // size]
            torch.sum(spread.unflatten(0, (-1, size)), 1, out=sums)
        matrix[group + 1 :, group] = matrix[group, group + 1 :]
    return matrix.permute(2, 0, 1)


def _solve(matrix: Tensor, right_side: Tensor, old: Tensor) -> Tensor:
    """Return x [rows, groups] of matrix · x = right_side, pulled a little to `old`; all float64."""
    # The pull (Tikhonov) keeps groups of zeros solvable.
    pull = 1e-4 * matrix.diagonal(dim1=1, dim2=2)
    pull = pull + 1e-9 * pull.amax(1, keepdim=True) + torch.finfo(torch.float32).tiny
    matrix.diagonal(dim1=1, dim2=2).add_(pull)
    return torch.linalg.solve(matrix, (right_side + pull * old)[..., None])[..., 0]


def _coordinate_descent(rows: _Rows, hessian: Tensor) -> Tensor:
    """Return qweight [in, rows] after each channel has moved once to where the error is least."""
    all_channels = torch.arange(len(hessian), device=hessian.device)
    everything = slice(0, len(hessian))
    qweight, error = rows.qweight.clone(), torch.empty_like(rows.weight)
    for span in _spans(everything, STEP):
        scale, zero = rows.grid(all_channels[span])
        error[span] = rows.weight[span] - (qweight[span] - zero) * scale
    curvature = hessian.diagonal().tolist()
    for block in _spans(everything, _block_size(len(hessian))):
        # How the output error falls with each weight, earlier channels as they are by now.
        block_slope = hessian[block] @ error
        changes = torch.empty_like(block_slope)
        for span in _spans(block, STEP):
            q, (scale, zero) = qweight[span], rows.grid(all_channels[span])
            slope = block_slope[span.start - block.start :][: len(q)]
            change = changes[span.start - block.start :][: len(q)]
            if span.start > block.start:
                before = slice(block.start, span.start)
                slope.addmm_(hessian[span, before], changes[: span.start - block.start])
            hessian_span = hessian[span, span].contiguous()
            for channel, channel_slope in enumerate(slope):
                step = channel_slope / curvature[span.start + channel]
                target = (q[channel] - zero[channel]).mul_(scale[channel]).add_(step)
                new = target.div_(scale[channel]).round_().add_(zero[channel])
                new.clamp_(0, rows.max_value)
                torch.sub(q[channel], new, out=change[channel]).mul_(scale[channel])
                q[channel] = new
                if channel + 1 < len(slope):
                    following = hessian_span[channel, channel + 1 :]
                    slope[channel + 1 :].addr_(following, change[channel])
            error[span] = rows.weight[span] - (q - zero) * scale
    return qweight
