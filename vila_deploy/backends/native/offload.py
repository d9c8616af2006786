"""A vision tower whose layers stay in host memory and visit the GPU one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_deploy.model.vision import VisionEncoder

# Of a weight in its layer's buffer, in bytes: what cuBLAS and vector loads like best.
ALIGNMENT = 256


def stream_layers(encoder: VisionEncoder, device: str) -> VisionEncoder:
    """Moves `encoder` to `device` but for its layers, each of which is there while it computes."""
    inside, blocks = encoder.tower.encoder, encoder.tower.encoder.get_submodule("layers")
    inside.layers = nn.ModuleList()
    encoder.to(device)
    inside.layers = blocks
    for layer in blocks.children():
        _Visit(layer, device)
    return encoder


@dataclass(frozen=True)
class _Place:
    """A weight's parameter `name` in `parameters` of its module, and where its bytes lie."""

    parameters: dict[str, nn.Parameter | None]
    name: str
    shape: torch.Size
    dtype: torch.dtype
    bytes: slice

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.bytes].view(self.dtype).view(self.shape)

    def put(self, buffer: Tensor) -> None:
        self.parameters[self.name] = nn.Parameter(self.of(buffer), requires_grad=False)


class _Visit:
    """Hooks of a layer: its weights come before it computes and are dropped behind it.

    They lie in one buffer, which comes in one copy. torch rounds each piece of page-locked memory
    up to a power of two, which in many pieces would take half as much again.
    """

    def __init__(self, layer: nn.Module, device: str):
        self._device, self._places = device, list[_Place]()
        weights, end = [], 0
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                start = -(-end // ALIGNMENT) * ALIGNMENT
                end = start + parameter.nbytes
                kind = parameter.shape, parameter.dtype
                self._places.append(_Place(module._parameters, name, *kind, slice(start, end)))
                weights.append(parameter.detach())
        self._stored = torch.empty(end, dtype=torch.uint8, pin_memory=device != "cpu")
        for place, weight in zip(self._places, weights, strict=True):
            place.of(self._stored).copy_(weight)
        self._leave()
        layer.register_forward_pre_hook(lambda module, inputs: self._come())
        layer.register_forward_hook(lambda module, inputs, output: self._leave())

    def _come(self) -> None:
        # Copies and kernels are on one stream, so a layer waits for its weights by itself.
        here = self._stored.to(self._device, non_blocking=True, copy=True)
        for place in self._places:
            place.put(here)

    def _leave(self) -> None:
        for place in self._places:
            place.put(self._stored)


def pinned(tensor: Tensor, device: str) -> Tensor:
    """In host memory that `device` can read by itself; in the interpreter any memory is."""
    return tensor.cpu() if device == "cpu" else tensor.cpu().pin_memory()
