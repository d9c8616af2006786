"""Second moments of what enters a linear layer, and the factors that error feedback needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Off-diagonal moments are what changes most from text to text: reduced by this much, the result is
# best on texts unlike the calibration data (docs/quantization.md has the figures).
SHRINK = 0.15
# Of the mean moment, added to all: channels that were silent in calibration must not be free.
DAMPING = 0.003
# Of the moments, brought into another order at a time, so that there is no third copy of them.
ROWS_IN_ORDER = 256


class InputMoments:
    """Sums over tokens of xᵀx for inputs x [tokens, channels], and of tᵀx for targets t.

    Args:
        channels: of the inputs.
        outputs: channels of the targets; 0 if there are none.
    """

    def __init__(self, channels: int, outputs: int = 0, device: torch.device | None = None):
        self.tokens = 0
        self._gram = torch.zeros(channels, channels, device=device)
        self._cross = torch.zeros(outputs, channels, device=device)

    def add(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Takes the next tokens: inputs [tokens, channels] and targets [tokens, outputs]."""
        self.tokens += len(inputs)
        self._gram.addmm_(inputs.T, inputs)
        if targets is not None:
            self._cross.addmm_(targets.T, inputs)

    def metric(self) -> Metric:
        """The moments as means, made robust; they belong to the metric then."""
        gram = self._gram.div_(self.tokens)
        cross = self._cross.div_(self.tokens)
        power = gram.diagonal().clone()
        added = SHRINK * power + DAMPING * power.mean() + torch.finfo(torch.float32).tiny
        gram.mul_(1 - SHRINK).diagonal().copy_((1 - SHRINK) * power + added)
        return Metric.of(gram, added, cross)


@dataclass
class Metric:
    """A quadratic measure of the output error that a change of weights causes, and its factors.

    gram[order][:, order] = F · diag(conditional[order]) · Fᵀ with F unit upper triangular: rounding
    channels in `order` and passing each error on by F is GPTQ, written without an inverse
    (Chee et al. 2023, QuIP, theorem 6).

    Args:
        gram: float32 [channels, channels], mean xᵀx, off-diagonal reduced by SHRINK.
        added: what regularisation added to the diagonal [channels].
        cross: mean tᵀx [outputs, channels].
        order: channels by falling power.
        feedback: F, in that order.
        conditional: error that a unit change of a channel leaves when the channels after it in the
            order make up for it as well as they can [channels].
    """

    gram: Tensor
    added: Tensor
    cross: Tensor
    order: Tensor
    feedback: Tensor
    conditional: Tensor

    @classmethod
    def of(cls, gram: Tensor, added: Tensor, cross: Tensor) -> Metric:
        """Factors `gram`, which must be positive definite."""
        order = gram.diagonal().argsort(descending=True, stable=True)
        # A Cholesky factor is lower triangular; the reversed matrix gives the upper one.
        reverse = order.flip(0)
        reordered = torch.empty_like(gram)
        for begin in range(0, len(gram), ROWS_IN_ORDER):
            rows = slice(begin, begin + ROWS_IN_ORDER)
            torch.index_select(gram[reverse[rows]], 1, reverse, out=reordered[rows])
        factor = torch.linalg.cholesky(reordered)
        del reordered
        factor = factor.flip(0, 1)
        diagonal = factor.diagonal().clone()
        conditional = torch.empty_like(diagonal)
        conditional[order] = diagonal.square()
        return cls(gram, added, cross, order, factor.div_(diagonal), conditional)

    def rescale(self, scales: Tensor) -> None:
        """To inputs divided by `scales` [channels], in place."""
        self.gram.div_(scales[:, None]).div_(scales)
        self.cross.div_(scales)
        self.added.div_(scales.square())
        self.conditional.div_(scales.square())
        ordered = scales[self.order]
        self.feedback.mul_(ordered).div_(ordered[:, None])

    def fit(self, weight: Tensor) -> Tensor:
        """What to add to `weight` [outputs, channels] to bring x Wᵀ nearest to the targets t.

        That is (tᵀx - W C) G⁻¹ , C = (G - added) / (1 - SHRINK) the plain moments, without W C.
        """
        found = (self.cross + weight * (self.added / (1 - SHRINK)))[:, self.order].T
        found = torch.linalg.solve_triangular(
            self.feedback, found, upper=True, unitriangular=True
        ).div_(self.conditional[self.order][:, None])
        found = torch.linalg.solve_triangular(
            self.feedback.T, found, upper=False, unitriangular=True
        )
        fitted = torch.empty_like(weight)
        fitted[:, self.order] = found.T
        return fitted.sub_(weight, alpha=1 / (1 - SHRINK))

    def output_error(self, difference: Tensor) -> float:
        """Mean square over tokens and outputs of x Dᵀ, without what regularisation added."""
        robust = ((difference @ self.gram) * difference).sum(1).mean()
        extra = (difference.square() @ self.added).mean()
        return float((robust - extra).clamp(min=0) / (1 - SHRINK))
