"""Learn per-channel scales for GPTQ by gradient descent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.algorithms.hessian import HessianFactor

STEPS = 30
LEARNING_RATE = 0.05
ROWS = 512
# Where AWQ's grid search ends up most often; the result hardly depends on it.
START_RATIO = 0.35
# Further out, the float16 group scales of the layer before would lose digits.
MAX_LOG_SCALE = math.log(64)
# Below this error the weights are zero: its logarithm has no gradient to follow.
ZERO_ERROR = 1e-30


def learn_scales(
    weight: Tensor,
    factor: HessianFactor,
    scheme: QuantScheme,
    tie: Tensor | None = None,
    row_bits: Tensor | None = None,
) -> Tensor:
    """Return scales s [in] that make W · s best to round when inputs are divided by s.

    GPTQ's expected output error is Σ over rows and groups of step² / 12 · Σ over the group's
    channels of d / s², where step is the range of W · s in the group over 15. That is
    differentiable in s, so all scales move at once, instead of along AWQ's one-dimensional family
    mean|x|^ratio. Weights that are all zero, as in a pruned layer, keep scales of 1.

    Args:
        weight: [out, in], all linears that share the input stacked.
        factor: of the unscaled inputs.
        tie: int64 [in], channels with the same number share a scale; by default each has its own.
        row_bits: of each row [out] where linears of several numbers of bits share the input.
    """
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight)), device=weight.device)
    sample = weight[rows.long()]
    # A range in more bits has shorter steps; relative ones leave equal bits as they are.
    if row_bits is not None and bool((row_bits != row_bits[0]).any()):
        steps = 1 / (2.0 ** row_bits[rows.long().to(row_bits.device)] - 1)
        sample = sample * (steps / steps.max()).to(sample)[:, None]
    tie = torch.arange(weight.shape[1], device=weight.device) if tie is None else tie
    start = factor.hessian.diagonal().sqrt().clamp(min=1e-12).log() * START_RATIO
    counts = torch.bincount(tie)
    logs = torch.zeros(len(counts), device=weight.device).index_add_(0, tie, start) / counts
    logs = (logs - logs.mean()).clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)
    # The caller may be in inference mode, whose tensors can't take part in a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        logs = _gradient_descent(logs.clone(), sample.clone(), factor.d.clone(), tie, scheme)
    return logs[tie].exp()


def _gradient_descent(
    logs: Tensor, sample: Tensor, d: Tensor, tie: Tensor, scheme: QuantScheme
) -> Tensor:
    logs.requires_grad_(True)
    optimizer = torch.optim.Adam([logs], lr=LEARNING_RATE)
    tie = tie.clone()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        scales = logs[tie].exp()
        ranges = _ranges((sample * scales).unflatten(1, (-1, scheme.group_size)), scheme)
        importance = (d / scales.square()).unflatten(0, (-1, scheme.group_size)).sum(-1)
        error = (ranges.square().sum(0) * importance).sum()
        if step == 0 and error.item() < ZERO_ERROR:
            return torch.zeros_like(logs)
        optimizer.zero_grad()
        error.log().backward()
        optimizer.step()
    return logs.detach().clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)


def _ranges(groups: Tensor, scheme: QuantScheme) -> Tensor:
    """Return the range of each group that the quantized values cover."""
    if scheme.symmetric:
        return groups.abs().amax(-1)
    return groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
