"""The quantized checkpoint in every format that was asked for, written as the layers come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.scheme import QuantScheme
from vila_deploy.writers.registry import FORMATS


class Outputs:
    """One checkpoint in `folder` for one format, in `folder`/NAME each for several.

    Args:
        formats: keys of FORMATS.
    """

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, formats: Sequence[str], scheme: QuantScheme
    ):
        self._writers = []
        for name in formats:
            own = folder / name if len(formats) > 1 else folder
            own.mkdir(exist_ok=True)
            self._writers.append(FORMATS[name].writer(checkpoint, own, scheme))

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        """What llm/ holds under `name`: a float16 tensor, or a quantized linear."""
        for writer in self._writers:
            writer.add(name, value)

    def finish(self) -> None:
        """Writes the rest of each checkpoint, its configs and its checksums."""
        for writer in self._writers:
            writer.finish()
