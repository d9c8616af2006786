"""Random weights of any config's shapes, cut out of one random block, so that it takes no time."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.tensor_schema import (
    TensorSpec,
    llm_tensor_specs,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.formats.base import BITS, QuantizedLinear

# A prime, so that the rows of a weight differ although the block repeats.
BLOCK = 1_048_573
MEAN_SQUARE = 22.0  # of q − zero, for q uniform in 0..15 and zero in 6..9


class RandomWeights:
    """A WeightSource that makes each tensor when it is asked for, the same one every time.

    Linears have unit gain, norms are 1, so that activations stay in range through any depth.
    """

    def __init__(self, expected: Iterable[TensorSpec], llm: LlmConfig | None = None, seed: int = 0):
        self._shapes = {tensor.name: tensor.shape for tensor in expected}
        self._linears = llm.linears if llm else {}
        self._group_size = llm.quantization.group_size if llm and llm.quantization else None
        self._generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(BLOCK, generator=self._generator)
        self._values = self._integers(0, 2**BITS)
        self._zeros = self._integers(6, 10)

    def _integers(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (BLOCK,), generator=self._generator, dtype=torch.uint8)

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.float16)
        fan_in = torch.Size(shape[1:]).numel()
        return _repeated((self._normal / fan_in**0.5).half(), shape, name)

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        if self._group_size is None:
            return self.tensor(f"{prefix}.weight")
        out_features, in_features = self._linears[prefix.split(".", 3)[3]]
        groups = (out_features, in_features // self._group_size)
        scale = (MEAN_SQUARE * in_features) ** -0.5
        return QuantizedLinear(
            q=_repeated(self._values, (out_features, in_features), prefix),
            scale=torch.full(groups, scale, dtype=torch.float16),
            zero=_repeated(self._zeros, groups, prefix),
            bias=self.tensor(f"{prefix}.bias") if f"{prefix}.bias" in self._shapes else None,
        )


def random_weights(config: VilaConfig) -> ModelWeights:
    """Return sources for llm, vision tower and projector of `config`."""
    return ModelWeights(
        RandomWeights(llm_tensor_specs(config.llm), config.llm),
        RandomWeights(tower_tensor_specs(config)),
        RandomWeights(projector_tensor_specs(config)),
    )


def _repeated(block: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Return `block` repeated to `shape`, from an offset that depends on `name`.

    No two layers may be equal: onnxruntime would keep one copy, and a step would read less memory
    than that of a trained model.
    """
    count = torch.Size(shape).numel()
    start = zlib.crc32(name.encode()) % BLOCK
    return block.repeat(-(-(start + count) // BLOCK))[start : start + count].view(shape)
