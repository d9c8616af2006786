"""The vision tower of an engine: the matrices of its layers in float16, or in int8 with scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import projector_tensor_specs, tower_tensor_specs
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.int8_linear import round_int8
from vila_deploy.formats.module_dtypes import FP16, is_tower_linear
from vila_deploy.model.vision import VisionEncoder

# Behind the name of a matrix in int8.
SCALE = ".scale"


class Int8Linear(nn.Module):
    """y = x · (q · scale)ᵀ + bias: kept in int8, widened to the type of x for the product.

    The widened weight is q · scale rounded once, as the engine of TensorRT has it.

    Args:
        q: int8 [out, in].
        scale: float16 [out].
        bias: [out] or None.
    """

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        # Parameters, so that a streamed layer takes them along.
        self.q, self.scale = (nn.Parameter(x, requires_grad=False) for x in (q, scale))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        # In place, so that there is one widened matrix at a time.
        weight = self.q.to(x.dtype).mul_(self.scale.to(x.dtype)[:, None])
        return linear(x, weight, self.bias)


def tower_tensors(
    config: VilaConfig, tower: WeightSource, projector: WeightSource, dtype: str = FP16
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of tower and projector by name, as an engine stores them.

    Raises:
        VilaDeployError: a weight is so large that its scale is no float16.
    """
    for spec in tower_tensor_specs(config):
        weight = tower.tensor(spec.name)
        if dtype == FP16 or not is_tower_linear(spec.name, spec.shape):
            yield spec.name, weight.half()
            continue
        rounded = round_int8(weight, spec.name)
        yield spec.name, rounded.q
        yield spec.name + SCALE, rounded.scale
    for spec in projector_tensor_specs(config):
        yield spec.name, projector.tensor(spec.name).half()


def load_encoder(
    stored: Mapping[str, Tensor], config: VilaConfig, dtype: torch.dtype
) -> VisionEncoder:
    """Return the encoder of what `tower_tensors` gave; matrices in int8 stay so."""
    source = _Stored(stored)
    encoder = VisionEncoder(config, source, source, dtype)
    prefix = config.vision.family.prefix
    for name, module in list(encoder.tower.named_modules()):
        full = f"{prefix}{name}.weight"
        if full + SCALE not in stored:
            continue
        assert isinstance(module, nn.Linear)
        small = Int8Linear(stored[full], stored[full + SCALE], module.bias)
        encoder.tower.set_submodule(name, small)
    return encoder.eval()


class _Stored:
    """Tensors of a file as a WeightSource; those in int8 are without values, to be replaced."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor if tensor.is_floating_point() else tensor.to("meta")

    def linear(self, prefix: str) -> Tensor:
        return self.tensor(f"{prefix}.weight")
