"""The KL that rounding a weight costs a model, to second order."""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.formats.base import QuantScheme
from vila_deploy.formats.int8_linear import int8_scale
from vila_deploy.formats.rtn import quantize_groups

# The mean square of an error that is uniform over a step of 1.
UNIFORM = 1 / 12


def grouped_rounding_kl(
    weight: Tensor, squared_gradient: Tensor, importance: Tensor, scheme: QuantScheme
) -> float:
    """Return the KL of `weight` [out, in] in groups, whose outputs' errors are independent.

    Args:
        squared_gradient: of the log-probability, in a token's mean, by output [out].
        importance: what an error of each input channel [in] costs in an output's mean square.
    """
    scale = quantize_groups(weight, scheme)[1].squeeze(-1)
    channels = importance.unflatten(0, (-1, scheme.group_size)).sum(-1)
    errors = (scale.square() * UNIFORM) @ channels
    return float(0.5 * (squared_gradient * errors).sum(dtype=torch.float64))


def int8_rounding_kl(weight: Tensor, squared_gradient: Tensor) -> float:
    """Return the KL of float32 `weight` [out, in] in int8 with a scale for each output.

    Args:
        squared_gradient: of the log-probability with respect to the weights of each output [out],
            their sum, in a token's mean.
    """
    errors = int8_scale(weight).double().square() * UNIFORM
    return float(0.5 * (squared_gradient.double() * errors).sum())
