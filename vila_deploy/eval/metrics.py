"""Compare two models' next-token distributions: KL divergence, perplexity, top-1 agreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenMetrics:
    """Figures of each token, all [tokens].

    Args:
        kl: KL(expected ‖ actual) in nats, float64.
        expected_loss, loss: negative log-likelihood of the token that follows, by the expected
            and by the actual distribution, float64.
        same_top1: bool, whether both models find the same token most likely.
    """

    kl: Tensor
    expected_loss: Tensor
    loss: Tensor
    same_top1: Tensor

    @classmethod
    def zeros(cls, count: int) -> TokenMetrics:
        """Return the figures of `count` tokens, to be filled in by `compare_logits`."""
        kl, expected_loss, loss = torch.zeros(3, count, dtype=torch.float64)
        return cls(kl, expected_loss, loss, torch.zeros(count, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.kl)

    def __getitem__(self, index: slice | Tensor) -> TokenMetrics:
        """Return the figures of some tokens: views for a slice, copies for a mask."""
        return TokenMetrics(
            self.kl[index], self.expected_loss[index], self.loss[index], self.same_top1[index]
        )


@dataclass(frozen=True)
class Quality:
    """Differences of the quantized model's next-token distributions from the original's.

    KL is KL(original ‖ quantized) in nats, per token; `kl_p99` its 99th percentile. Top-1 agreement
    is the share of tokens for which both models find the same one most likely.
    """

    tokens: int
    perplexity_original: float
    perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float

    @classmethod
    def of(cls, metrics: TokenMetrics) -> Quality | None:
        """Return the summary of some tokens; None if there are none."""
        if not len(metrics):
            return None
        return cls(
            tokens=len(metrics),
            perplexity_original=perplexity(metrics.expected_loss),
            perplexity=perplexity(metrics.loss),
            kl_mean=float(metrics.kl.mean()),
            kl_p99=float(metrics.kl.quantile(0.99)),
            top1_agreement=top1_agreement(metrics.same_top1),
        )


def compare_logits(
    expected: Tensor,
    actual: Tensor,
    targets: Tensor | None = None,
    out: TokenMetrics | None = None,
    scratch: Tensor | None = None,
) -> TokenMetrics:
    """Return the figures of each row of logits; `expected` and `actual` are overwritten.

    NumPy callers pass `torch.from_numpy(logits)`; the arithmetic is in the logits' own precision.

    Args:
        expected, actual: logits [tokens, vocabulary].
        targets: int64 [tokens], the token that follows each; without them the losses are zero.
        out: where to put the figures; by default they are new.
        scratch: [tokens, vocabulary], to compute in; by default it is new.
    """
    out = TokenMetrics.zeros(len(expected)) if out is None else out
    log_p = torch.empty_like(expected) if scratch is None else scratch
    # Of the logits: their log-softmax, being rounded, can make near ties equal.
    out.same_top1.copy_(expected.argmax(1) == actual.argmax(1))
    torch.log_softmax(expected, 1, out=log_p)
    log_q = torch.log_softmax(actual, 1, out=expected)
    if targets is not None:
        out.expected_loss.copy_(-log_p.gather(1, targets[:, None])[:, 0])
        out.loss.copy_(-log_q.gather(1, targets[:, None])[:, 0])
    difference = torch.sub(log_p, log_q, out=actual)
    out.kl.copy_(torch.linalg.vecdot(log_p.exp_(), difference))
    return out


def perplexity(losses: Tensor) -> float:
    """Return exp of the mean of `losses`, negative log-likelihoods in nats."""
    return float(losses.mean().exp())


def top1_agreement(same_top1: Tensor) -> float:
    """Return the share of tokens for which both models find the same one most likely."""
    return float(same_top1.double().mean())


def relative_errors(expected: Tensor, actual: Tensor) -> Tensor:
    """Return each row's squared difference over its squared norm in `expected` (NMSE) [rows].

    By row, since the hidden states of a few tokens are a thousand times those of others.
    """
    energy = expected.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (actual - expected).square().sum(-1) / energy
