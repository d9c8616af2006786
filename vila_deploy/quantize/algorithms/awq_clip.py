"""Search AWQ's clip value of each group, as llm-awq defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.quantize.algorithms.awq_scales import FakeQuantize

GRID = 20
MAX_SHRINK = 0.5
CLIP_STEPS = int(MAX_SHRINK * GRID)
ROWS_AT_A_TIME = 1024
# The error of q or k alone is a poor guide to that of q·kᵀ, so llm-awq does not clip them.
SKIPPED = ("self_attn.q_proj", "self_attn.k_proj")


def search_clip(
    weight: Tensor, samples: Tensor, group_size: int, fake_quantize: FakeQuantize
) -> Tensor:
    """Return the best max|w| per group: the first of 1, 0.95 … 0.55 times it with the least error.

    The error of a group is the mean square over the sampled tokens of that group's share of the
    output, x_g · (w_g − ŵ_g); as a quadratic form with the group's xᵀx it is a batched matmul.

    Args:
        weight: [out, in], scales already folded in.
        samples: inputs [tokens, in] that belong to it.

    Returns:
        clip values [out, in/group].
    """
    inputs = samples.unflatten(1, (-1, group_size)).transpose(0, 1)
    hessian = inputs.mT @ inputs / len(samples)
    parts = weight.split(ROWS_AT_A_TIME)
    return torch.cat([_search_rows(part, hessian, fake_quantize) for part in parts])


def _search_rows(weight: Tensor, hessian: Tensor, fake_quantize: FakeQuantize) -> Tensor:
    group_size = hessian.shape[-1]
    full = weight.unflatten(1, (-1, group_size)).abs().amax(-1)
    best, least = full.clone(), torch.full_like(full, float("inf"))
    for step in range(CLIP_STEPS):
        clip = full * (1 - step / GRID)
        changed = fake_quantize(apply_clip(weight, clip)) - weight
        difference = changed.unflatten(1, (-1, group_size)).transpose(0, 1)
        error = ((difference @ hessian) * difference).sum(-1).T
        better = error < least
        best, least = torch.where(better, clip, best), torch.where(better, error, least)
    return best


def apply_clip(weight: Tensor, clip: Tensor) -> Tensor:
    """Return `weight` [out, in] clipped to ± `clip` [out, in/group], group by group."""
    groups = weight.unflatten(1, (clip.shape[1], -1))
    return groups.clamp(-clip[..., None], clip[..., None]).flatten(1)
