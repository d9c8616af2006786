"""Data types of the modules beside the decoder layers: vision tower, output head, KV cache."""

from __future__ import annotations

from vila_deploy.utils.errors import VilaDeployError

FP16, INT8, INT4 = "fp16", "int8", "int4"
# Activations of 4-bit linears on a CPU: float32, int8 with a scale for each token and group of
# weights, or the sum of two such terms, which has 15 bits.
INT8X2, FP32 = "int8x2", "fp32"
ACTIVATIONS = (INT8, INT8X2, FP32)
# Group sizes of an int4 head, in order of preference.
HEAD_GROUP_SIZES = (128, 64, 32, 16)


def head_group_size(hidden_size: int) -> int:
    """Return how many weights of an int4 head share a scale.

    An int8 head has one scale a row; backends that know only groups repeat it.

    Raises:
        VilaDeployError: no group size divides `hidden_size`.
    """
    for group_size in HEAD_GROUP_SIZES:
        if hidden_size % group_size == 0:
            return group_size
    raise VilaDeployError(
        f"the model's hidden size {hidden_size} has no groups of {HEAD_GROUP_SIZES[-1]} or more",
        where="--lm-head",
        fix="leave --lm-head out",
    )


def is_tower_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of the vision tower is a matrix of its layers: int8 applies to it."""
    return "encoder.layers." in name and len(shape) == 2
