"""AWQ's search for the largest magnitude to keep in each group, as llm-awq defines it."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.quantize.algorithms.awq_scales import FakeQuantize

GRID = 20
MAX_SHRINK = 0.5
ROWS_AT_A_TIME = 1024
# Clipping one side of the product q·kᵀ by its own error is no good guide, so llm-awq leaves it out.
SKIPPED = ("self_attn.q_proj", "self_attn.k_proj")


def search_clip(
    weight: Tensor, samples: Tensor, group_size: int, fake_quantize: FakeQuantize
) -> Tensor:
    """Best max|w| per group: of factors 1, 0.95 … 0.55 the first with the least output error.

    The error of a group is the mean square over the sampled tokens of that group's share of the
    output, x_g · (w_g − ŵ_g); as a quadratic form with the group's xᵀx it is a batched matmul.

    Args:
        weight: [out, in], scales already folded in.
        samples: inputs [tokens, in] that belong to it.

    Returns:
        largest magnitudes [out, in/group].
    """
    inputs = samples.unflatten(1, (-1, group_size)).transpose(0, 1)
    gram = inputs.mT @ inputs / len(samples)
    parts = weight.split(ROWS_AT_A_TIME)
    return torch.cat([_search_rows(part, gram, fake_quantize) for part in parts])


def _search_rows(weight: Tensor, gram: Tensor, fake_quantize: FakeQuantize) -> Tensor:
    group_size = gram.shape[-1]
    full = weight.unflatten(1, (-1, group_size)).abs().amax(-1)
    best, least = full.clone(), torch.full_like(full, float("inf"))
    for step in range(int(MAX_SHRINK * GRID)):
        limit = full * (1 - step / GRID)
        changed = fake_quantize(apply_clip(weight, limit)) - weight
        difference = changed.unflatten(1, (-1, group_size)).transpose(0, 1)
        error = ((difference @ gram) * difference).sum(-1).T
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return best


def apply_clip(weight: Tensor, limit: Tensor) -> Tensor:
    """`weight` [out, in] cut to ± `limit` [out, in/group], group by group."""
    groups = weight.unflatten(1, (limit.shape[1], -1))
    return groups.clamp(-limit[..., None], limit[..., None]).flatten(1)
