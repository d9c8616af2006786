"""The interface of a quantization algorithm: one decoder layer after the other."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.formats.base import QuantizedLinear, QuantScheme, to_float16
from vila_deploy.model.llm import load_decoder_layer

LayerEntry = dict[str, Any]
LayerTensors = dict[str, Tensor | QuantizedLinear]
OnStep = Callable[[str], None]


class LayerQuantizer(ABC):
    """Quantizes the decoder layers of a checkpoint, first to last.

    `steps_per_layer` says how often `quantize` calls `on_step`.
    """

    steps_per_layer: int

    def __init__(self, checkpoint: Checkpoint, scheme: QuantScheme, device: torch.device):
        self.checkpoint, self.scheme, self.device = checkpoint, scheme, device
        self.config = checkpoint.config.llm

    @abstractmethod
    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        """Return the layer's norms and linears by full name, and its entry in the report.

        Args:
            on_step: to be called with the name of each step when it begins.
        """

    @abstractmethod
    def skip(self, index: int, tensors: LayerTensors) -> None:
        """Advance this object's state as quantizing the layer to `tensors` did."""

    def load(self, index: int) -> nn.Module:
        """Return the layer in float32 with weights that may be changed."""
        # The previous layer must be freed first.
        gc.collect()
        layer = load_decoder_layer(self.config, self.checkpoint.llm, index)
        # Loading maps float32 weights from the file; folding must not write into it.
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(self.device, copy=True)
        return layer


def stored_tensors(
    prefix: str, norms: Mapping[str, Tensor], linears: Mapping[str, QuantizedLinear]
) -> LayerTensors:
    """Return a layer's tensors as they are stored: full names, norms in float16, on the host.

    Args:
        prefix: of the layer's tensor names.
        norms, linears: by their names inside the layer.
    """
    weights = {f"{prefix}.{name}.weight": weight for name, weight in norms.items()}
    stored = {name: to_float16(weight, name).contiguous().cpu() for name, weight in weights.items()}
    return stored | {f"{prefix}.{name}": linear.cpu() for name, linear in linears.items()}
