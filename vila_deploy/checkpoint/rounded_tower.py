"""A vision tower some of whose linears are to be written in int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vila_deploy.checkpoint.int8_tower import SCALE, int8_config
from vila_deploy.checkpoint.reader import TensorReader

if TYPE_CHECKING:
    from torch import Tensor


class RoundedTower(TensorReader):
    """Reads a tower's tensors as `base` does; `stored` are those to be written.

    Args:
        linears: full names of those in int8, at least one.
    """

    def __init__(self, base: TensorReader, linears: Sequence[str]):
        super().__init__(base.tensors(), aliases=base.aliases)
        self._base, self._linears = base, tuple(linears)

    def tensor(self, name: str) -> Tensor:
        return self._base.tensor(name)

    def stored(self) -> dict[str, Tensor]:
        """Return all tensors by name, those in int8 with their scales [out, 1].

        Raises:
            VilaDeployError: a weight is so large that its scale is no float16.
        """
        from vila_deploy.formats.int8_linear import round_int8

        rounded = {f"{linear}.weight" for linear in self._linears}
        tensors = {}
        for name in self.names():
            tensor = self._base.tensor(name)
            if name in rounded:
                linear = round_int8(tensor, name)
                tensors[name], tensors[name + SCALE] = linear.q, linear.scale[:, None]
            else:
                tensors[name] = tensor
        return tensors

    def quantization_config(self) -> dict[str, Any]:
        """Return what the tower's config.json says of them."""
        return int8_config(self._linears)
