"""Rounding to 4 bits with error feedback, then improving levels and scales in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.errors import VilaDeployError
from vila_deploy.formats.quantized_linear import MAX_LEVEL, QuantizedLinear
from vila_deploy.quantize.limits import ROWS_AT_A_TIME, SOLVE_BYTES
from vila_deploy.quantize.moments import Metric
from vila_deploy.quantize.round import range_levels, to_float16
from vila_deploy.quantize.scheme import QuantScheme

# Of the full range of a group. A little more than all pays off where its ends matter least.
RANGE_FACTORS = tuple(1.05 - 0.05 * step for step in range(11))
SEARCHED_ROWS = 64
REFINEMENTS = 1
# A refitted scale further away belongs to a group that hardly matters; the old one is safer.
MAX_REFIT_FACTOR = 2.0
BLOCK = 64


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

    def per_channel(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each weight [in, rows]."""
        return (
            self.scale.repeat_interleave(self.group_size, 0),
            self.zero.repeat_interleave(self.group_size, 0),
        )

    def centred(self) -> Tensor:
        """Levels less their zero points [in, rows]."""
        return self.levels - self.zero.repeat_interleave(self.group_size, 0)


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
    # What a few rows need stays in a processor's cache from one range to the next.
    few = SEARCHED_ROWS if weight.device.type == "cpu" else len(weight)
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
    order = metric.order
    weight = rows.weight[order]
    scale, zero = (values[order] for values in rows.per_channel())
    feedback = metric.feedback.T
    wanted, errors = weight.clone(), torch.empty_like(weight)
    levels = torch.empty_like(weight)
    for begin in range(0, len(weight), BLOCK):
        end = min(begin + BLOCK, len(weight))
        if begin:
            wanted[begin:end].addmm_(feedback[begin:end, :begin], errors[:begin])
        within = feedback[begin:end, begin:end].contiguous()
        for channel in range(begin, end):
            want = wanted[channel]
            if channel > begin:
                want.addmv_(errors[begin:channel].T, within[channel - begin, : channel - begin])
            level = want.div(scale[channel]).round_().add_(zero[channel]).clamp_(0, MAX_LEVEL)
            levels[channel] = level
            errors[channel] = weight[channel] - (level - zero[channel]) * scale[channel]
    result = torch.empty_like(levels)
    result[order] = levels
    return result


def _refit_scales(rows: _Rows, gram: Tensor, pulled: Tensor) -> Tensor:
    """The scales [in/group, rows] with the least error for the levels as they are.

    For a row with centred levels v, the scales s of its groups solve A s = b with
    A_gh = v_g · gram_gh · v_h and b_g = v_g · gram_g · w.

    Args:
        pulled: gram · weight [in, rows].
    """
    size, (channels, count) = rows.group_size, rows.weight.shape
    groups = channels // size
    levels = rows.centred()
    matrix = levels.new_empty(count, groups, groups)
    for group in range(groups):
        begin = group * size
        here = slice(begin, begin + size)
        # A is symmetric, so the groups before this one have their share already.
        spread = (gram[begin:, here] @ levels[here]).mul_(levels[begin:])
        matrix[:, group:, group] = spread.unflatten(0, (-1, size)).sum(1).T
        matrix[:, group, group:] = matrix[:, group:, group]
    wanted = (pulled * levels).unflatten(0, (groups, size)).sum(1).T.double()
    old = rows.scale.T.double()
    # In double precision a few rows at a time, or these matrices would be the most memory of all.
    at_a_time = max(1, SOLVE_BYTES // (groups * groups * 8))
    parts = zip(*(part.split(at_a_time) for part in (matrix, wanted, old)), strict=True)
    found = torch.cat([_solve(each.double(), *others) for each, *others in parts])
    stored = found.to(torch.float16).double()
    near = (stored > old / MAX_REFIT_FACTOR) & (stored < old * MAX_REFIT_FACTOR)
    return torch.where(near, stored, old).float().T.contiguous()


def _solve(matrix: Tensor, wanted: Tensor, old: Tensor) -> Tensor:
    """x [rows, groups] of matrix · x = wanted, with a little pull towards `old`; all float64."""
    # The pull keeps groups of zeros solvable.
    pull = 1e-4 * matrix.diagonal(dim1=1, dim2=2)
    pull = pull + 1e-9 * pull.amax(1, keepdim=True) + torch.finfo(torch.float32).tiny
    matrix.diagonal(dim1=1, dim2=2).add_(pull)
    return torch.linalg.solve(matrix, (wanted + pull * old)[..., None])[..., 0]


def _descend(rows: _Rows, gram: Tensor) -> Tensor:
    """Levels [in, rows] after each channel has moved once to where the error is least."""
    scale, zero = rows.per_channel()
    levels = rows.levels.clone()
    left = rows.weight - (levels - zero) * scale
    curvature = gram.diagonal().tolist()
    for begin in range(0, len(levels), BLOCK):
        end = min(begin + BLOCK, len(levels))
        # How the error falls with each weight, with the channels before these as they are by now.
        near, within = gram[begin:end] @ left, gram[begin:end, begin:end].contiguous()
        for channel in range(begin, end):
            step = near[channel - begin] / curvature[channel]
            wanted = (levels[channel] - zero[channel]).mul_(scale[channel]).add_(step)
            level = wanted.div_(scale[channel]).round_().add_(zero[channel]).clamp_(0, MAX_LEVEL)
            change = (levels[channel] - level).mul_(scale[channel])
            levels[channel] = level
            if channel + 1 < end:
                near[channel - begin + 1 :].addr_(
                    within[channel - begin, channel - begin + 1 :], change
                )
        left[begin:end] = (
            rows.weight[begin:end] - (levels[begin:end] - zero[begin:end]) * scale[begin:end]
        )
    return levels
