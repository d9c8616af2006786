"""What a quantization is: bits, group size, zero points; and which linears it applies to."""

from __future__ import annotations

from dataclasses import dataclass

from vila_deploy.checkpoint.llm_config import LlmConfig, layer_prefix
from vila_deploy.utils.errors import VilaDeployError

# What the engines' 4-bit kernels take as a block of input channels.
GROUP_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class QuantScheme:
    """4-bit weights, one scale and zero point for `group_size` neighbouring input channels.

    Symmetric means that every zero point is 8, so that w = scale · (q − 8).
    """

    group_size: int = 128
    symmetric: bool = False
    bits: int = 4

    @property
    def bits_per_weight(self) -> float:
        """Storage of a weight with its share of the float16 scale and the 4-bit zero point."""
        return self.bits + (16 + self.bits) / self.group_size


def check_scheme(scheme: QuantScheme, config: LlmConfig) -> None:
    """Refuses a group size or a layer shape that the format can't hold, before any work.

    Raises:
        VilaDeployError: names the first linear that doesn't fit and the group sizes that would.
    """
    fitting = fitting_group_sizes(config)
    choose = (
        f"choose --group-size {' or '.join(map(str, fitting))}"
        if fitting
        else (f"none of {', '.join(map(str, GROUP_SIZES))} divides the widths of this model")
    )
    if scheme.group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"group size {scheme.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}",
            fix=choose,
        )
    for name, (out_features, in_features) in config.linears.items():
        where = f"{layer_prefix(0)}.{name}"
        if in_features % scheme.group_size:
            raise VilaDeployError(
                f"group size {scheme.group_size} does not divide its {in_features} input channels",
                where=where,
                fix=choose,
            )
        if out_features % 8:
            raise VilaDeployError(
                f"{out_features} output channels are not a multiple of 8",
                where=where,
                fix="AWQ GEMM packs 8 channels into a word; this model doesn't fit the format",
            )


def fitting_group_sizes(config: LlmConfig) -> list[int]:
    """The group sizes that divide the input channels of every quantized linear."""
    widths = {in_features for _, in_features in config.linears.values()}
    return [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
