"""Rounding to 4 bits with error feedback, then improving levels and scales in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.formats.base import MAX_LEVEL, QuantizedLinear
from vila_deploy.formats.rtn import range_levels, to_float16
from vila_deploy.formats.scheme import QuantScheme
from vila_deploy.quantize.algorithms.hessian import Metric
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import ROWS_AT_A_TIME, SOLVE_BYTES, TILE_ROWS

# Of the full range of a group. A little more than all pays off where its ends matter least.
RANGE_FACTORS = tuple(1.05 - 0.05 * step for step in range(11))
# Weights that stay in a processor's cache from one range to the next.
SEARCHED_NUMBERS = 1 << 18
REFINEMENTS = 1
# A refitted scale further away belongs to a group that hardly matters; the old one is safer.
MAX_REFIT_FACTOR = 2.0
# Channels that are rounded one by one before the others hear of it, and steps that make a block. A
# block hears of all before it in one product: wider ones are faster where no cache holds the rest.
STEP = 64
BLOCK_STEPS, BLOCK_FROM = 8, 2048
# Of a product of TILE_ROWS columns whose result a processor keeps in its cache.
TILE_CHANNELS = 1024


@dataclass
class _Rows:
    """Some rows on their way, channels first so that one channel is contiguous.

    Args:
        weight, levels: float32 [in, rows].
        scale, zero: float32 [in/group, rows].
    """

    weight: Tensor
    levels: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int

    def grid(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each weight in `channels` [n, rows]."""
        groups = channels // self.group_size
        return self.scale[groups], self.zero[groups]


def round_with_feedback(
    weight: Tensor, metric: Metric, scheme: QuantScheme, name: str, bias: Tensor | None = None
) -> QuantizedLinear:
    """Quantizes float32 `weight` [out, in] so that its outputs change least in `metric`.

    Group ranges are searched with every channel's conditional importance; channels are rounded one
    after the other, each one's error passed on to those that follow (GPTQ, Frantar et al. 2022,
    largest first); then scales by least squares and levels by coordinate descent, in turn.

    Raises:
        VilaDeployError: a scale or the bias does not fit into float16.
    """
    parts = [_round_rows(rows, metric, scheme) for rows in weight.split(ROWS_AT_A_TIME)]
    scale = torch.cat([scale for _, scale, _ in parts], 1).T
    if not bool(torch.isfinite(scale).all()):
        raise VilaDeployError(
            f"weights up to {float(weight.abs().max()):.3g} need a scale beyond float16",
            where=name,
            fix="check that this checkpoint is not damaged",
        )
    return QuantizedLinear(
        q=torch.cat([levels for levels, _, _ in parts]),
        scale=scale.to(torch.float16).contiguous(),
        zero=torch.cat([zero for _, _, zero in parts], 1).T.to(torch.uint8).contiguous(),
        bias=None if bias is None else to_float16(bias, f"{name}.bias"),
    )


def _round_rows(
    weight: Tensor, metric: Metric, scheme: QuantScheme
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels uint8 [rows, in]; scale and zero float32 [in/group, rows]."""
    on_cpu = weight.device.type == "cpu"
    few = max(1, SEARCHED_NUMBERS // weight.shape[1]) if on_cpu else len(weight)
    found = [_search_ranges(part, metric, scheme) for part in weight.split(few)]
    scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    transposed = weight.T.contiguous()
    rows = _Rows(
        transposed, transposed, scale.T.contiguous(), zero.T.contiguous(), scheme.group_size
    )
    rows.levels = _feed_back(rows, metric)
    pulled = metric.gram @ rows.weight
    for _ in range(REFINEMENTS):
        rows.scale = _refit_scales(rows, metric.gram, pulled)
        rows.levels = _descend(rows, metric.gram)
    rows.scale = _refit_scales(rows, metric.gram, pulled)
    # Other rows wait for these, so they take no more memory than they must.
    return rows.levels.to(torch.uint8).T.contiguous(), rows.scale, rows.zero


def _search_ranges(weight: Tensor, metric: Metric, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out, in/group] of the range with the least expected error."""
    groups = weight.unflatten(1, (-1, scheme.group_size))
    importance = metric.conditional.unflatten(0, (-1, scheme.group_size))
    least: Tensor | None = None
    best_scale = best_zero = groups.new_empty(0)
    for factor in RANGE_FACTORS:
        q, scale, zero = range_levels(groups, scheme, factor)
        error = torch.einsum(
            "ogc,gc->og", q.sub_(zero).mul_(scale).sub_(groups).square_(), importance
        )
        scale, zero = scale.squeeze(-1), zero.squeeze(-1)
        if least is None:
            least, best_scale, best_zero = error, scale, zero
        else:
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _feed_back(rows: _Rows, metric: Metric) -> Tensor:
    """Levels [in, rows]: each channel is rounded with the errors of those before it made up for."""
    feedback = metric.feedback.T
    errors, levels = torch.empty_like(rows.weight), torch.empty_like(rows.weight)
    for block in _spans(slice(0, len(levels)), _block_size(len(levels))):
        wanted_block = rows.weight[metric.order[block]]
        if block.start:
            wanted_block.addmm_(feedback[block, : block.start], errors[: block.start])
        for span in _spans(block, STEP):
            channels = metric.order[span]
            weight, (scale, zero) = rows.weight[channels], rows.grid(channels)
            wanted = wanted_block[span.start - block.start :][: len(weight)]
            if span.start > block.start:
                before = slice(block.start, span.start)
                wanted.addmm_(feedback[span, before], errors[before])
            within, lost, rounded = feedback[span, span].contiguous(), errors[span], zero.clone()
            for channel, want in enumerate(wanted):
                if channel:
                    want.addmv_(lost[:channel].T, within[channel, :channel])
                level = rounded[channel].add_(want.div(scale[channel]).round_())
                level.clamp_(0, MAX_LEVEL)
                lost[channel] = weight[channel] - (level - zero[channel]) * scale[channel]
            levels[channels] = rounded
    return levels


def _block_size(channels: int) -> int:
    return STEP * BLOCK_STEPS if channels > BLOCK_FROM else STEP


def _spans(whole: slice, size: int) -> Iterator[slice]:
    """Parts of `size` of a range of channels."""
    for start in range(whole.start, whole.stop, size):
        yield slice(start, min(start + size, whole.stop))


def _refit_scales(rows: _Rows, gram: Tensor, pulled: Tensor) -> Tensor:
    """The scales [in/group, rows] with the least error for the levels as they are.

    For a row with centred levels v, the scales s of its groups solve A s = b with
    A_gh = v_g · gram_gh · v_h and b_g = v_g · gram_g · w.

    Args:
        pulled: gram · weight [in, rows].
    """
    size, (groups, count) = rows.group_size, rows.scale.shape
    few = max(1, min(TILE_ROWS, SOLVE_BYTES // (groups * groups * 8)))
    scale = torch.empty_like(rows.scale)
    for begin in range(0, count, few):
        part = slice(begin, begin + few)
        levels = rows.levels[:, part] - rows.zero[:, part].repeat_interleave(size, 0)
        wanted = (pulled[:, part] * levels).unflatten(0, (groups, size)).sum(1).T.double()
        old = rows.scale[:, part].T.double()
        found = _solve(_equations(levels, gram, size).double(), wanted, old)
        stored = found.to(torch.float16).double()
        near = (stored > old / MAX_REFIT_FACTOR) & (stored < old * MAX_REFIT_FACTOR)
        scale[:, part] = torch.where(near, stored, old).T
    return scale


def _equations(levels: Tensor, gram: Tensor, size: int) -> Tensor:
    """A of the above [rows, groups, groups] for centred `levels` [in, rows]."""
    channels, count = levels.shape
    groups = channels // size
    on_cpu = levels.device.type == "cpu"
    tile = (TILE_CHANNELS // size * size or size) if on_cpu else channels
    matrix = levels.new_empty(groups, groups, count)
    product = levels.new_empty(tile, count)
    for begin in range(0, channels, size):
        group, here = begin // size, slice(begin, begin + size)
        # A is symmetric, so the groups before this one have their share already.
        for first in range(begin, channels, tile):
            there = slice(first, min(first + tile, channels))
            spread = product[: there.stop - first]
            torch.mm(gram[there, here], levels[here], out=spread).mul_(levels[there])
            sums = matrix[group, first // size : there.stop // size]
            torch.sum(spread.unflatten(0, (-1, size)), 1, out=sums)
        matrix[group + 1 :, group] = matrix[group, group + 1 :]
    return matrix.permute(2, 0, 1)


def _solve(matrix: Tensor, wanted: Tensor, old: Tensor) -> Tensor:
    """x [rows, groups] of matrix · x = wanted, with a little pull towards `old`; all float64."""
    # The pull keeps groups of zeros solvable.
    pull = 1e-4 * matrix.diagonal(dim1=1, dim2=2)
    pull = pull + 1e-9 * pull.amax(1, keepdim=True) + torch.finfo(torch.float32).tiny
    matrix.diagonal(dim1=1, dim2=2).add_(pull)
    return torch.linalg.solve(matrix, (wanted + pull * old)[..., None])[..., 0]


def _descend(rows: _Rows, gram: Tensor) -> Tensor:
    """Levels [in, rows] after each channel has moved once to where the error is least."""
    every = torch.arange(len(gram), device=gram.device)
    whole = slice(0, len(gram))
    levels, left = rows.levels.clone(), torch.empty_like(rows.weight)
    for span in _spans(whole, STEP):
        scale, zero = rows.grid(every[span])
        left[span] = rows.weight[span] - (levels[span] - zero) * scale
    curvature = gram.diagonal().tolist()
    for block in _spans(whole, _block_size(len(gram))):
        # How the error falls with each weight, with the channels before these as they are by now.
        slope_block = gram[block] @ left
        changes = torch.empty_like(slope_block)
        for span in _spans(block, STEP):
            level, (scale, zero) = levels[span], rows.grid(every[span])
            slope = slope_block[span.start - block.start :][: len(level)]
            change = changes[span.start - block.start :][: len(level)]
            if span.start > block.start:
                before = slice(block.start, span.start)
                slope.addmm_(gram[span, before], changes[: span.start - block.start])
            within = gram[span, span].contiguous()
            for channel, steepest in enumerate(slope):
                step = steepest / curvature[span.start + channel]
                wanted = (level[channel] - zero[channel]).mul_(scale[channel]).add_(step)
                found = wanted.div_(scale[channel]).round_().add_(zero[channel])
                found.clamp_(0, MAX_LEVEL)
                torch.sub(level[channel], found, out=change[channel]).mul_(scale[channel])
                level[channel] = found
                if channel + 1 < len(slope):
                    slope[channel + 1 :].addr_(within[channel, channel + 1 :], change[channel])
            left[span] = rows.weight[span] - (level - zero) * scale
    return levels
