"""What the prediction of a prompt counts is what a prompt launches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vila_deploy.backends.native.decode_step import Cache, StepConfig
from vila_deploy.backends.native.memory import PROMPT_KERNELS
from vila_deploy.backends.native.prompt_pass import PromptBuffers, PromptPass
from vila_deploy.backends.native.weights import empty_llm
from vila_deploy.bench.predict_prompt import DEQUANTIZED, KERNELS, PromptModel
from vila_deploy.checkpoint.presets import preset
from vila_deploy.kernels.capability import ComputeCapability


@pytest.mark.parametrize("tokens", [256, 384])
def test_launches_are_those_of_a_pass(tokens: int) -> None:
    llm = replace(preset("VILA1.5-3b", "int4").llm, num_layers=2)
    config = StepConfig(llm, 512, ComputeCapability(9, 0), "meta")
    weights = empty_llm(llm, 512)
    buffers = PromptBuffers(config, weights, tokens)
    found = PromptPass(config, weights, Cache(llm, 512, "meta"), buffers, tokens)
    assert len(found.calls) == PromptModel(llm, "h200", tokens).launches
    assert len(found.first_layer) - 1 == KERNELS + DEQUANTIZED * (tokens > 256)
    assert PROMPT_KERNELS == KERNELS + DEQUANTIZED


def test_a_graph_is_no_slower_than_launches_one_by_one() -> None:
    for model in ("VILA1.5-3b", "VILA1.5-40b"):
        llm = preset(model, "int4").llm
        for tokens in (16, 256, 1024):
            graph, launches = (PromptModel(llm, "h200", tokens, graph=g) for g in (True, False))
            assert graph.device_seconds == launches.device_seconds
            assert graph.seconds < 1.01 * launches.seconds
    small = PromptModel(preset("VILA1.5-3b", "int4").llm, "h200", 64)
    assert replace(small, graph=False).seconds > 2 * small.seconds
