"""Search AWQ's per-channel scales, as llm-awq defines it, and fold them into the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_deploy.utils.errors import VilaDeployError

GRID = 20
MIN_SCALE = 1e-4

FakeQuantize = Callable[[Tensor], Tensor]
"""A weight [out, in] → the same weight after quantizing and dequantizing."""


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share one input and therefore one scale vector.

    `previous` is the operation whose output is divided by the scales; `inspected` is the module
    whose output error decides.
    """

    previous: str
    linears: tuple[str, ...]
    inspected: str


ATTENTION_GROUP = ScaleGroup(
    "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"
)
OUT_GROUP = ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj")
MLP_GROUP = ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp")
DOWN_GROUP = ScaleGroup("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
GROUPS = (ATTENTION_GROUP, OUT_GROUP, MLP_GROUP, DOWN_GROUP)


@dataclass(frozen=True)
class ScaleChoice:
    """The outcome for one group: `scales` [in], and the mean square error of each ratio tried.

    Ratio 0 means no scaling at all: its error is that of round to nearest.
    """

    group: ScaleGroup
    ratio: float
    scales: Tensor
    errors: tuple[float, ...]


def candidate_scales(mean_abs: Tensor, ratio: float) -> Tensor:
    """Return s = mean|x|^ratio, at least 1e-4, divided by sqrt(max · min)."""
    scales = mean_abs.pow(ratio).clamp(min=MIN_SCALE)
    return scales / (scales.max() * scales.min()).sqrt()


def search_scales(
    group: ScaleGroup,
    mean_abs: Tensor,
    weights: Sequence[Tensor],
    quantizers: Sequence[FakeQuantize],
    error: Callable[[Sequence[Tensor]], float],
) -> ScaleChoice:
    """Return the outcome for the first of the ratios 0, 1/20 … 19/20 with the least error.

    Args:
        mean_abs: mean |x| per input channel [in].
        weights: the group's weights [out, in]; only read.
        quantizers: one for each of them.
        error: mean square error of the inspected module's output with the given weights.

    Raises:
        VilaDeployError: no ratio gives a finite error.
    """
    errors = []
    best: tuple[float, float, Tensor] | None = None
    for step in range(GRID):
        ratio = step / GRID
        scales = candidate_scales(mean_abs, ratio)
        rounded = zip(quantizers, weights, strict=True)
        ratio_error = error([quantize(weight * scales) / scales for quantize, weight in rounded])
        errors.append(ratio_error)
        if ratio_error < (best[0] if best else float("inf")):
            best = (ratio_error, ratio, scales)
    if best is None:
        raise VilaDeployError(
            "no scale gives finite outputs",
            where=group.inspected,
            fix="check that this checkpoint is not damaged",
        )
    return ScaleChoice(group, best[1], best[2], tuple(errors))


def has_group(layer: nn.Module, group: ScaleGroup) -> bool:
    """Return whether the group's scales can be folded into the operation before it.

    A linear before it must match channel by channel: under grouped-query attention v_proj has
    fewer rows than o_proj has columns; llm-awq then leaves o_proj unscaled.
    """
    if group is not OUT_GROUP:
        return True
    return weight_of(layer, group.previous).shape == weight_of(layer, group.linears[0]).shape


def fold_scales(layer: nn.Module, choice: ScaleChoice) -> Tensor:
    """Divide the previous operation by the scales and multiply the group's input channels.

    A norm's weight is stored as float16, so it is rounded here and the linears are multiplied by
    the scales that this rounding really leaves.

    Returns:
        the scales that were applied [in].
    """
    previous = weight_of(layer, choice.group.previous)
    scales = choice.scales.to(previous.dtype)
    if previous.ndim == 1:
        stored = (previous / scales).to(torch.float16).to(previous.dtype)
        exact = (stored != 0) & torch.isfinite(stored)
        scales = torch.where(exact, previous / stored, scales)
        previous.copy_(stored)
    else:
        previous.div_(scales[:, None])
        bias = bias_of(layer, choice.group.previous)
        if bias is not None:
            bias.div_(scales)
    for name in choice.group.linears:
        weight_of(layer, name).mul_(scales)
    return scales


def bias_of(layer: nn.Module, name: str) -> Tensor | None:
    """Return a submodule's bias, as data that may be changed in place; None if it has none."""
    bias = getattr(layer.get_submodule(name), "bias", None)
    assert bias is None or isinstance(bias, Tensor)
    return None if bias is None else bias.data


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """Return a submodule's weight, as data that may be changed in place."""
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.data
