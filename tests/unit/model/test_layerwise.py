"""Packed hidden states through a decoder layer against each sequence by itself."""

import pytest
import torch

from tests.support.awq_case import CASES, llm_config, random_layer
from vila_deploy.model.layerwise import (
    PackedHiddenStates,
    after_attention,
    after_mlp,
    down_proj_inputs,
)
from vila_deploy.model.llm import rotary, run_layer
from vila_deploy.utils.device import CPU

CASE = CASES["grouped_query"]
LENGTHS = (7, 30, 30, 1, 12)


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, CASE.hidden, generator=generator) for length in LENGTHS]


def alone(sequences):
    """Each sequence through the layer by transformers' own code, with a mask."""
    layer, _ = random_layer(CASE)
    outputs = []
    for sequence in sequences:
        cos, sin = rotary(llm_config(CASE), torch.arange(len(sequence)))
        outputs.append(run_layer(layer, sequence[None], cos, sin)[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("max_chunk_tokens", [None, 1, 40])
def test_advance_is_each_sequence_alone(sequences, max_chunk_tokens):
    states = PackedHiddenStates.on_device(llm_config(CASE), list(sequences), CPU, max_chunk_tokens)
    assert states.lengths == LENGTHS
    states.advance(random_layer(CASE)[0])
    torch.testing.assert_close(states.hidden, alone(sequences), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_tokens", [1, 40, 1000])
def test_linear_by_linear_is_each_sequence_alone(sequences, tmp_path, chunk_tokens):
    fp = PackedHiddenStates.on_host(llm_config(CASE), list(sequences), tmp_path, CPU, chunk_tokens)
    states, layer = fp.copy(), random_layer(CASE)[0]
    for chunk in states.chunks:
        hidden = states.load(chunk)
        hidden = after_attention(layer, hidden, states.o_proj_inputs(layer, hidden, chunk))
        states.hidden[chunk.tokens] = after_mlp(layer, hidden, down_proj_inputs(layer, hidden))
    torch.testing.assert_close(states.hidden, alone(sequences), rtol=1e-4, atol=1e-4)
    assert torch.equal(fp.hidden, torch.cat(sequences)), "a copy has hidden states of its own"


def test_chunks_are_whole_sequences(sequences, tmp_path):
    def lengths(states):
        assert [chunk.tokens.start for chunk in states.chunks[1:]] == [
            chunk.tokens.stop for chunk in states.chunks[:-1]
        ]
        return [chunk.lengths for chunk in states.chunks]

    config = llm_config(CASE)
    at_most = PackedHiddenStates.on_device(config, list(sequences), CPU, 40)
    assert lengths(at_most) == [(7, 30), (30, 1), (12,)]
    at_least = PackedHiddenStates.on_host(config, list(sequences), tmp_path, CPU, 40)
    assert lengths(at_least) == [(7, 30, 30), (1, 12)]


def test_packing_empties_the_list(sequences, tmp_path):
    given = list(sequences)
    PackedHiddenStates.on_host(llm_config(CASE), given, tmp_path, CPU, 40)
    assert not given
