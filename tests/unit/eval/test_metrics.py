"""KL, perplexity and top-1 agreement against plain float64 NumPy and torch's own losses."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from vila_deploy.eval.metrics import Quality, TokenMetrics, compare_logits


@pytest.fixture
def logits():
    generator = np.random.default_rng(0)
    return generator.normal(size=(2, 9, 17)) * 3


def test_kl_and_top1_equal_numpy(logits):
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in logits)
    expected_kl = (np.exp(p) * (p - q)).sum(1)
    expected_top1 = logits[0].argmax(1) == logits[1].argmax(1)
    metrics = compare_logits(*torch.from_numpy(logits))
    np.testing.assert_allclose(metrics.kl.numpy(), expected_kl, rtol=1e-12)
    assert metrics.same_top1.tolist() == expected_top1.tolist()


def test_quality_equals_torchs_losses(logits):
    expected, actual = torch.from_numpy(logits).float()
    targets = torch.arange(len(expected))
    kl = kl_div(actual.log_softmax(1), expected.softmax(1), reduction="none").sum(1)
    values = {
        "tokens": len(targets),
        "perplexity_original": float(cross_entropy(expected, targets).exp()),
        "perplexity": float(cross_entropy(actual, targets).exp()),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1_agreement": float((expected.argmax(1) == actual.argmax(1)).float().mean()),
    }
    metrics = compare_logits(expected.clone(), actual.clone(), targets)
    assert vars(Quality.of(metrics)) == pytest.approx(values, rel=1e-5)


def test_chunks_with_buffers_give_the_same(logits):
    expected, actual = torch.from_numpy(logits).float()
    targets = torch.arange(len(expected))
    whole = compare_logits(expected.clone(), actual.clone(), targets)
    metrics, scratch = TokenMetrics.zeros(len(targets)), torch.empty(4, expected.shape[1])
    for begin in range(0, len(targets), 4):
        here = slice(begin, begin + 4)
        rows = expected[here].clone(), actual[here].clone(), targets[here]
        compare_logits(*rows, metrics[here], scratch[: len(targets[here])])
    for name, values in vars(whole).items():
        torch.testing.assert_close(getattr(metrics, name), values)


def test_no_tokens_have_no_quality(logits):
    metrics = compare_logits(*torch.from_numpy(logits))
    assert Quality.of(metrics[torch.zeros(len(metrics), dtype=torch.bool)]) is None
