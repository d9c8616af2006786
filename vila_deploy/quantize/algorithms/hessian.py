"""The Hessian XᵀX of a linear layer's inputs, and the UDUᵀ factor that GPTQ needs of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Off-diagonal entries are what changes most from text to text: reduced by this share, the result is
# best on texts unlike the calibration data (docs/quantization.md has the figures).
SHRINK = 0.15
# Added to the diagonal, as a share of its mean: channels that calibration never excites must not
# be free to round.
DAMPING = 0.003
# Below this mean square inputs are zero: float32 has no digits left to factor them with.
ZERO_MEAN_SQUARE = 1e-30
# Rows of the Hessian that are permuted at a time, so that there is no third copy of it.
ROWS_IN_ORDER = 256


class HessianAccumulator:
    """Sums over tokens of xᵀx for inputs x [tokens, channels], and of tᵀx for targets t.

    Args:
        channels: of the inputs.
        outputs: channels of the targets; 0 if there are none.
    """

    def __init__(self, channels: int, outputs: int = 0, device: torch.device | None = None):
        self.tokens = 0
        self._hessian = torch.zeros(channels, channels, device=device)
        self._cross = torch.zeros(outputs, channels, device=device)

    def add(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Add the next tokens: inputs [tokens, channels] and targets [tokens, outputs]."""
        self.tokens += len(inputs)
        self._hessian.addmm_(inputs.T, inputs)
        if targets is not None:
            self._cross.addmm_(targets.T, inputs)

    def factor(self) -> HessianFactor:
        """Return means over tokens, shrunk, damped and factored; the sums are used up.

        Inputs that are all zero, as behind a pruned linear, give the identity: every channel
        counts the same.
        """
        hessian = self._hessian.div_(self.tokens)
        cross = self._cross.div_(self.tokens)
        mean_square = hessian.diagonal().clone()
        if float(mean_square.mean()) < ZERO_MEAN_SQUARE:
            identity = hessian.zero_().fill_diagonal_(1)
            return HessianFactor.of(identity, identity.diagonal().clone(), cross.zero_())
        damping = SHRINK * mean_square + DAMPING * mean_square.mean()
        damping += torch.finfo(torch.float32).tiny
        hessian.mul_(1 - SHRINK).diagonal().copy_((1 - SHRINK) * mean_square + damping)
        return HessianFactor.of(hessian, damping, cross)


@dataclass
class HessianFactor:
    """A Hessian H and its factor: the output error of a weight change D is tr(D H Dᵀ).

    H[order][:, order] = U · diag(d[order]) · Uᵀ with U unit upper triangular: rounding channels in
    `order` and passing each error on by U is GPTQ, written without an inverse (Chee et al. 2023,
    QuIP, theorem 6).

    Args:
        hessian: float32 [channels, channels], mean xᵀx, off-diagonal reduced by SHRINK.
        damping: what shrinking and damping added to the diagonal [channels].
        cross: mean tᵀx [outputs, channels].
        order: channels by falling mean square.
        u: U, in that order.
        d: of each channel [channels], in the channels' own order: the error that a unit change
            leaves when the channels after it in `order` correct it as well as they can.
    """

    hessian: Tensor
    damping: Tensor
    cross: Tensor
    order: Tensor
    u: Tensor
    d: Tensor

    @classmethod
    def of(cls, hessian: Tensor, damping: Tensor, cross: Tensor) -> HessianFactor:
        """Factor `hessian`, which must be positive definite."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        # A Cholesky factor is lower triangular; the reversed matrix gives the upper one.
        reverse = order.flip(0)
        reordered = torch.empty_like(hessian)
        for begin in range(0, len(hessian), ROWS_IN_ORDER):
            rows = slice(begin, begin + ROWS_IN_ORDER)
            torch.index_select(hessian[reverse[rows]], 1, reverse, out=reordered[rows])
        factor = torch.linalg.cholesky(reordered)
        del reordered
        factor = factor.flip(0, 1)
        diagonal = factor.diagonal().clone()
        d = torch.empty_like(diagonal)
        d[order] = diagonal.square()
        return cls(hessian, damping, cross, order, factor.div_(diagonal), d)

    def rescale(self, scales: Tensor) -> None:
        """Change to inputs divided by `scales` [channels], in place."""
        self.hessian.div_(scales[:, None]).div_(scales)
        self.cross.div_(scales)
        self.damping.div_(scales.square())
        self.d.div_(scales.square())
        ordered = scales[self.order]
        self.u.mul_(ordered).div_(ordered[:, None])

    def least_squares_update(self, weight: Tensor) -> Tensor:
        """Return what to add to `weight` [outputs, channels] to bring x Wᵀ nearest to targets t.

        That is (tᵀx - W C) H⁻¹ with C = (H - damping) / (1 - SHRINK), the plain mean xᵀx, computed
        without forming W C.
        """
        solution = (self.cross + weight * (self.damping / (1 - SHRINK)))[:, self.order].T
        solution = torch.linalg.solve_triangular(
            self.u, solution, upper=True, unitriangular=True
        ).div_(self.d[self.order][:, None])
        solution = torch.linalg.solve_triangular(
            self.u.T, solution, upper=False, unitriangular=True
        )
        update = torch.empty_like(weight)
        update[:, self.order] = solution.T
        return update.sub_(weight, alpha=1 / (1 - SHRINK))

    def output_error(self, difference: Tensor) -> float:
        """Return the mean square of x Dᵀ over tokens and outputs, without shrinking and damping."""
        damped = ((difference @ self.hessian) * difference).sum(1).mean()
        extra = (difference.square() @ self.damping).mean()
        return float((damped - extra).clamp(min=0) / (1 - SHRINK))
