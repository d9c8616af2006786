"""Calibration sequences as the hidden states that enter a decoder layer, and running it on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.model.llm import rotary
from vila_deploy.quantize.algorithms.awq_stats import InputStats
from vila_deploy.utils.device import CPU

MLP_TOKENS_AT_A_TIME = 2048


@dataclass
class Sequences:
    """Hidden states of all sequences end to end.

    Args:
        hidden: float32 [tokens, hidden].
        lengths: tokens of each sequence.
        cos, sin: rotary tables [1, longest, head_dim].
    """

    hidden: Tensor
    lengths: tuple[int, ...]
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, config: LlmConfig, embeds: list[Tensor], device: torch.device = CPU) -> Sequences:
        """Sequences on `device` from the embeddings [tokens, hidden] of each."""
        lengths = tuple(map(len, embeds))
        cos, sin = rotary(config, torch.arange(max(lengths)))
        return cls(torch.cat(embeds).to(device), lengths, cos.to(device), sin.to(device))

    def attention(
        self, module: nn.Module, inputs: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Causal self-attention of each sequence, normed inputs [tokens, hidden] → the same shape.

        Args:
            weights: parameters of `module` to use instead of its own; it isn't changed.
        """
        # Without a mask this is causal; the written-out kind would need one, and ten times as long.
        module.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        output = torch.empty_like(inputs)
        start = 0
        for length in self.lengths:
            here = slice(start, start + length)
            arguments = {
                "hidden_states": inputs[None, here],
                "position_embeddings": (self.cos[:, :length], self.sin[:, :length]),
                "attention_mask": None,
            }
            output[here] = functional_call(module, dict(weights or {}), (), arguments)[0][0]
            start += length
        return output

    @torch.inference_mode()
    def pass_through(self, layer: nn.Module) -> None:
        """Moves on to the outputs of an unchanged decoder layer, bit for bit as quantizing it does.

        Recomputed rather than stored: it costs a twentieth of the search and no space on the disk,
        and any one layer whose stored result is damaged can be done again.
        """
        part = layer.get_submodule
        normed = part("input_layernorm")(self.hidden)
        self.hidden = self.hidden + self.attention(part("self_attn"), normed)
        normed = part("post_attention_layernorm")(self.hidden)
        self.hidden = self.hidden + mlp(part("mlp"), normed)


def mlp(module: nn.Module, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The feed-forward block on [tokens, hidden], in pieces that bound its inner activations.

    Args:
        weights: parameters of `module` to use instead of its own; it isn't changed.
    """
    parts = inputs.split(MLP_TOKENS_AT_A_TIME)
    return torch.cat([functional_call(module, dict(weights or {}), (part,)) for part in parts])


@contextmanager
def watch_inputs(linear: nn.Module, stats: InputStats) -> Iterator[None]:
    """While this is open, what enters `linear` goes into `stats`."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stats.add(args[0].flatten(0, -2))

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def mean_square(value: Tensor) -> float:
    """Mean of squares, summed row by row so that millions of terms keep their digits."""
    return float(value.square().mean(-1, dtype=torch.float32).mean(dtype=torch.float64))
