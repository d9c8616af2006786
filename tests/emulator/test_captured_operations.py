"""torch's operations in a captured graph of the stand-in for torch.cuda."""

from __future__ import annotations

import pytest
import torch


def test_a_replay_computes_anew_what_was_captured() -> None:
    """In their order: in place, into a given tensor, with a new one, and through a view."""
    x, y = torch.ones(2, 3), torch.zeros(3)
    weight = torch.arange(9.0).reshape(3, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x[0] += 1
        product = torch.mm(x, weight)
        added = torch.zeros(3)
        added += product[0]
        torch.add(added, 1, out=y)
    assert torch.equal(x, torch.ones(2, 3)), "a capture changes nothing"
    assert not y.any()
    for first in (2.0, 3.0):
        graph.replay()
        assert x.tolist() == [[first] * 3, [1.0] * 3]
        assert torch.equal(y, first * weight.sum(0) + 1)


def test_inputs_are_those_at_the_replay() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y.copy_(x.square().sum() * x)
    x.fill_(2)
    graph.replay()
    assert y.tolist() == [24.0] * 3


def test_the_host_reads_nothing_during_a_capture() -> None:
    x = torch.ones(1)
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.item()
    assert x.item() == 1
