"""Collect statistics of a linear layer's inputs for AWQ's searches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# llm-awq looks at every (tokens // 512)-th token when it searches for clip values.
CLIP_SAMPLE_TOKENS = 512


@dataclass
class InputStats:
    """Statistics over all calibration tokens of the inputs x [tokens, channels] of a linear.

    The output error of a linear whose weight changes by D is tr(D Σ xᵀx Dᵀ), exactly. So Σ xᵀx, the
    Hessian, replaces the inputs, whose size would grow with the calibration set. Only where
    there are fewer tokens than channels are the inputs smaller, and quicker to multiply with.

    Args:
        num_tokens: how many tokens will be added in all.
    """

    num_tokens: int
    seen: int = 0
    abs_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    _hessian_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    _inputs: list[Tensor] = field(default_factory=list)
    _samples: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor) -> None:
        """Add the next tokens, [tokens, channels] float32."""
        self.abs_sum = self.abs_sum + inputs.abs().sum(0)
        if self.num_tokens < inputs.shape[1]:
            self._inputs.append(inputs.clone())
        else:
            self._hessian_sum = self._hessian_sum + inputs.T @ inputs
        stride = max(1, self.num_tokens // CLIP_SAMPLE_TOKENS)
        self._samples.append(inputs[-self.seen % stride :: stride].clone())
        self.seen += len(inputs)

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| per channel [channels]."""
        return self.abs_sum / self.seen

    def output_error(self, difference: Tensor) -> float:
        """Return the mean square of x Dᵀ over tokens and outputs, for D `difference` [out, in]."""
        if self._inputs:
            total = sum(float((x @ difference.T).square().mean(1).sum()) for x in self._inputs)
            return total / self.seen
        hessian = self._hessian_sum / self.seen
        return float(((difference @ hessian) * difference).sum(1).mean())

    @property
    def samples(self) -> Tensor:
        """The strided sample of tokens [512 to 1023 or all, channels]."""
        return torch.cat(self._samples)


@contextmanager
def watch_inputs(linear: nn.Module, stats: InputStats) -> Iterator[None]:
    """Add the inputs of `linear` to `stats` while this is open."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stats.add(args[0].flatten(0, -2))

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
