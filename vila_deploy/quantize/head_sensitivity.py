"""Measure what rounding the output head costs: the variance of its logits' log-probabilities.

With p the model's own predictions, E[g²] of a logit's gradient is p (1 − p), and the KL of logits
that are off by independent δ is ½ Σ p (1 − p) E[δ²]. The head is rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.bit_choice import MODULE_WIDTHS
from vila_deploy.quantize.rounding_kl import grouped_rounding_kl
from vila_deploy.utils.limits import HEAD_ROWS


class HeadStatistics:
    """Sums over tokens: squared gradients of the logits, squares of the head's inputs with them."""

    def __init__(self, llm: LlmConfig, device: torch.device):
        self._squared_gradients = torch.zeros(llm.vocab_size, device=device)
        self._weighted_squares = torch.zeros(llm.hidden_size, device=device)

    def add(self, inputs: Tensor, probability: Tensor, predicts: Tensor) -> None:
        """Add tokens: inputs [tokens, hidden] of the head, probabilities [tokens, vocabulary].

        Args:
            predicts: bool [tokens], which of them count.
        """
        squares = (1 - probability).mul_(probability).mul_(predicts[:, None])
        self._squared_gradients += squares.sum(0)
        self._weighted_squares += squares.sum(1) @ inputs.square()

    def kl(self, weight: Tensor, predicted: int, group_size: int) -> dict[int, float]:
        """Return the KL of the head's `weight` [vocabulary, hidden] in each of MODULE_WIDTHS.

        Args:
            predicted: number of tokens that counted.
        """
        int8, float16 = MODULE_WIDTHS
        scheme = QuantScheme(group_size, symmetric=True, bits=int8)
        total = self._squared_gradients.sum().clamp(min=torch.finfo(torch.float32).tiny)
        importance = self._weighted_squares / total
        parts = zip(weight.split(HEAD_ROWS), self._squared_gradients.split(HEAD_ROWS), strict=True)
        cost = sum(
            grouped_rounding_kl(
                rows.to(importance.device).float(), squares / predicted, importance, scheme
            )
            for rows, squares in parts
        )
        return {int8: cost, float16: 0.0}
