"""A vision tower whose layers stay in host memory and visit the GPU one after the other."""

from __future__ import annotations

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
        self._stored = [
            (module._parameters, name, pinned(parameter.detach(), device))
            for module in layer.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self._leave()
        layer.register_forward_pre_hook(lambda module, inputs: self._come())
        layer.register_forward_hook(lambda module, inputs, output: self._leave())

    def _come(self) -> None:
        # Copies and kernels are on one stream, so a layer waits for its weights by itself.
        for parameters, name, stored in self._stored:
            moved = stored.to(self._device, non_blocking=True, copy=True)
            parameters[name] = nn.Parameter(moved, requires_grad=False)

    def _leave(self) -> None:
        for parameters, name, stored in self._stored:
            parameters[name] = nn.Parameter(stored, requires_grad=False)


def pinned(tensor: Tensor, device: str) -> Tensor:
    """In host memory that `device` can read by itself; in the interpreter any memory is."""
    return tensor.cpu() if device == "cpu" else tensor.cpu().pin_memory()
