"""The decoder layers that `vila-quantize --layers A:B` names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vila_deploy.utils.errors import VilaDeployError, short

PATTERN = re.compile(r"(\d{0,6}):(\d{0,6})", re.ASCII)
FORM = "give A:B, layers from A up to but not including B, counted from 0, such as 0:16 or 16:"


@dataclass(frozen=True)
class LayerRange:
    """Layers from `start` up to, not including, `stop`; None is the last layer's end."""

    start: int
    stop: int | None

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        """Return the range of `text`, such as 0:16, 16: or :16.

        Raises:
            VilaDeployError: of another form, or empty.
        """
        match = PATTERN.fullmatch(text)
        if not match:
            raise VilaDeployError(f"--layers {short(text)} is no range", fix=FORM)
        start, stop = (int(number) if number else None for number in match.groups())
        if stop is not None and stop <= (start or 0):
            raise VilaDeployError(f"--layers {text} is empty", fix=FORM)
        return cls(start or 0, stop)

    def of(self, num_layers: int) -> range:
        """Return the indices of the layers in a model of so many.

        Raises:
            VilaDeployError: the model has fewer layers.
        """
        stop = num_layers if self.stop is None else self.stop
        if self.start >= num_layers or stop > num_layers:
            raise VilaDeployError(
                f"--layers {self} is outside the model's {num_layers} layers",
                fix=f"give a range within 0:{num_layers}",
            )
        return range(self.start, stop)

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}"


def runs_of(indices: Iterable[int]) -> list[range]:
    """Return the runs of neighbouring indices, in order."""
    runs: list[range] = []
    for index in sorted(indices):
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs


def layers_text(indices: Iterable[int]) -> str:
    """Return "layer 3" or "layers 0-3, 7", as messages name layers."""
    runs = runs_of(indices)
    names = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    single = len(runs) == 1 and len(runs[0]) == 1
    return f"layer{'' if single else 's'} {', '.join(names)}"


def ranges_text(indices: Iterable[int]) -> str:
    """Return the values of --layers that name these layers: "3:4" or "0:4 and 7:8"."""
    return " and ".join(f"{run.start}:{run.stop}" for run in runs_of(indices))
