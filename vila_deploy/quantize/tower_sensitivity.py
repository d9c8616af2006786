"""Measure what int8 costs each linear of the vision tower: gradients of its weights.

The rounding errors of weights are independent, so to second order the KL is ½ Σ E[g²] · E[ε²] over
the weights, where g is the gradient of a sequence's log-probability (its Fisher information). All
tiles and tokens of the sequence are in g together, as they see the same error.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.tensor_schema import tower_linears
from vila_deploy.data.examples import LazyImage
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.processing.images import preprocess
from vila_deploy.quantize.bit_choice import MODULE_WIDTHS
from vila_deploy.quantize.rounding_kl import int8_rounding_kl
from vila_deploy.utils.progress import progress


class _Recomputed(nn.Module):
    """A layer whose activations are not kept for the way back but computed again."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, attention_mask: None = None) -> Tensor:
        output = recomputed(self.layer, hidden, attention_mask=attention_mask, use_reentrant=False)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first


def tower_sensitivities(
    checkpoint: Checkpoint,
    images: Sequence[Sequence[LazyImage]],
    gradients: Sequence[Tensor],
    predicted: int,
    device: torch.device,
) -> dict[str, dict[int, float]]:
    """Return the KL of each linear of the tower in int8, and none in float16, by name and bits.

    Args:
        images: of each sequence.
        gradients: [positions, hidden] of each sequence, with respect to its images' embeddings in
            order; the last of them may have been cut off.
        predicted: tokens that the sequences, and any others, predict.
    """
    config = checkpoint.config
    encoder = VisionEncoder(config, checkpoint.vision, checkpoint.projector).to(device)
    prefix = config.vision.family.prefix
    weights: dict[str, nn.Parameter] = {}
    squares: dict[str, Tensor] = {}
    for name in tower_linears(config):
        weight = encoder.tower.get_submodule(name.removeprefix(prefix)).get_parameter("weight")
        squares[name] = torch.zeros(len(weight), dtype=torch.float64, device=device)
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(partial(_add_square, squares[name]))
        weights[name] = weight
    layers = encoder.tower.encoder.get_submodule("layers")
    for index, layer in list(layers.named_children()):
        layers.set_submodule(index, _Recomputed(layer))
    with progress(len(images), "measuring the vision tower") as advance, torch.enable_grad():
        for shown, gradient in zip(images, gradients, strict=True):
            features = torch.cat([_features(encoder, checkpoint, image, device) for image in shown])
            rows = gradient.to(device)
            (features[: len(rows)] * rows).sum().backward()
            advance("images")
    int8, float16 = MODULE_WIDTHS
    return {
        name: {int8: int8_rounding_kl(weight.detach(), squares[name] / predicted), float16: 0.0}
        for name, weight in weights.items()
    }


def _add_square(total: Tensor, weight: Tensor) -> None:
    """Add the square of a weight's gradient, summed over each output's inputs, and drop it."""
    assert weight.grad is not None
    total += weight.grad.square().sum(1)
    weight.grad = None


def _features(
    encoder: VisionEncoder, checkpoint: Checkpoint, image: LazyImage, device: torch.device
) -> Tensor:
    """Return an image's embeddings [tokens, hidden], as calibration has them."""
    config = checkpoint.config
    (pixels,) = preprocess([image.load()], config.image, config.tiling, alone=False)
    tiles = torch.from_numpy(pixels.tiles).to(device)
    return encoder.encode(tiles, pixels.grid)[0]
