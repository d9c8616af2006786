"""A vision tower whose layers stay in host memory and are copied to the GPU one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_deploy.model.vision import VisionEncoder

# Bytes that a weight's offset in its layer's buffer is a multiple of, as cuBLAS likes it best.
ALIGNMENT = 256


def stream_layers(encoder: VisionEncoder, device: str) -> VisionEncoder:
    """Move `encoder` to `device` except its layers, each of which is there while it computes."""
    tower, layers = encoder.tower.encoder, encoder.tower.encoder.get_submodule("layers")
    tower.layers = nn.ModuleList()
    encoder.to(device)
    tower.layers = layers
    for layer in layers.children():
        _StreamedLayer(layer, device)
    return encoder


@dataclass(frozen=True)
class _WeightSlice:
    """A weight's parameter `name` in `parameters` of its module, and its bytes in a buffer."""

    parameters: dict[str, nn.Parameter | None]
    name: str
    shape: torch.Size
    dtype: torch.dtype
    bytes: slice

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.bytes].view(self.dtype).view(self.shape)

    def point_to(self, buffer: Tensor) -> None:
        self.parameters[self.name] = nn.Parameter(self.view(buffer), requires_grad=False)


class _StreamedLayer:
    """Hooks of a layer: its weights are copied in before it computes and dropped behind it.

    They lie in one buffer, which takes one copy. torch rounds each piece of page-locked memory up
    to a power of two, which in many pieces would take half as much again.
    """

    def __init__(self, layer: nn.Module, device: str):
        self._device, self._slices = device, list[_WeightSlice]()
        weights, end = [], 0
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                start = -(-end // ALIGNMENT) * ALIGNMENT
                end = start + parameter.nbytes
                kind = parameter.shape, parameter.dtype
                self._slices.append(
                    _WeightSlice(module._parameters, name, *kind, slice(start, end))
                )
                weights.append(parameter.detach())
        self._in_host = torch.empty(end, dtype=torch.uint8, pin_memory=device != "cpu")
        for location, weight in zip(self._slices, weights, strict=True):
            location.view(self._in_host).copy_(weight)
        self._drop()
        layer.register_forward_pre_hook(lambda module, inputs: self._copy_in())
        layer.register_forward_hook(lambda module, inputs, output: self._drop())

    def _copy_in(self) -> None:
        # Copies and kernels are on one CUDA stream, so a layer waits for its weights by itself.
        on_device = self._in_host.to(self._device, non_blocking=True, copy=True)
        for weight in self._slices:
            weight.point_to(on_device)

    def _drop(self) -> None:
        for weight in self._slices:
            weight.point_to(self._in_host)
