"""A vision tower whose layers stay in host memory and visit the GPU one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vila_deploy.model.vision import VisionEncoder


def stream_layers(encoder: VisionEncoder, device: str) -> VisionEncoder:
    """Moves `encoder` to `device` but for its layers, each of which is there while it computes."""
    inside, blocks = encoder.tower.encoder, encoder.tower.encoder.get_submodule("layers")
    inside.layers = nn.ModuleList()
    encoder.to(device)
    inside.layers = blocks
    for layer in blocks.children():
        _Visit(layer, device)
    return encoder


class _Visit:
    """Hooks of a layer: its weights come before it computes and are dropped behind it."""

    def __init__(self, layer: nn.Module, device: str):
        self._device = device
        self._pairs = [(each, pinned(each.data, device)) for each in layer.parameters()]
        self._leave()
        layer.register_forward_pre_hook(lambda module, inputs: self._come())
        layer.register_forward_hook(lambda module, inputs, output: self._leave())

    def _come(self) -> None:
        # Copies and kernels are on one stream, so a layer waits for its weights by itself.
        with torch.inference_mode(False):
            for parameter, stored in self._pairs:
                parameter.data = stored.to(self._device, non_blocking=True, copy=True)

    def _leave(self, *_: Any) -> None:
        for parameter, stored in self._pairs:
            parameter.data = stored


def pinned(tensor: Tensor, device: str) -> Tensor:
    """In host memory that `device` can read by itself; in the interpreter any memory is."""
    return tensor.cpu() if device == "cpu" else tensor.cpu().pin_memory()
