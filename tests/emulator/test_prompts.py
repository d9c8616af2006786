"""Prompts of compiled kernels: neither padding nor cuts nor graphs change a bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.inputs import config, random_llm
from tests.support.emulator.capabilities import NEWEST, emulated_capabilities
from tests.support.emulator.device import EmulatedDevice
from vila_deploy.backends.native.decode_step import DecodeStep, StepConfig
from vila_deploy.backends.native.prompts import Prompts
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.backends.native.slot_caches import SlotCaches
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.kernels.capability import ComputeCapability

pytestmark = pytest.mark.slow
TOKENS, SLOT = 40, 1


@dataclass(frozen=True)
class Case:
    """A decoder of small random weights, and the embeddings of a prompt."""

    config: StepConfig
    llm: object
    embeds: Tensor

    def append(
        self, dtype: str, pieces: list[int], lengths: list[int] | None = None
    ) -> list[Tensor]:
        """Return logits, keys and values of the prompt in pieces; all else must stay NaN."""
        caches = SlotCaches(self.config.llm, self.config.max_seq_len, 2, "cpu", dtype)
        cells = caches.keys, caches.values
        if dtype == "fp16":
            for vectors in cells:
                vectors.fill_(torch.nan)
        step = DecodeStep(self.config, self.llm, caches.sequence(SLOT))  # type: ignore[arg-type]
        prompts = Prompts(self.config, self.llm, caches, step)  # type: ignore[arg-type]
        prompts._lengths = lengths or prompts._lengths
        start = 0
        for piece in pieces:
            end = start + piece
            prompts.append(self.embeds[start:end], start, SLOT, more=end < TOKENS)
            start = end
        if dtype == "fp16":
            for vectors in cells:
                assert vectors[:, 1 - SLOT].isnan().all()
                assert vectors[:, SLOT, :, TOKENS:].isnan().all()
        held = [vectors[:, SLOT, :, :TOKENS].clone() for vectors in cells]
        assert step.logits.isfinite().all()
        return [step.logits.clone(), step.token.clone(), *held]


@pytest.fixture(params=emulated_capabilities(), ids=str)
def case(request: pytest.FixtureRequest, emulated_device: EmulatedDevice) -> Case:
    emulated_device.capability = request.param
    torch.manual_seed(0)
    return small(request.param, 96)


def small(capability: ComputeCapability, max_seq_len: int) -> Case:
    llm_config = replace(config("8B", "int4", small=True), num_layers=2)
    step_config = StepConfig(llm_config, max_seq_len, capability, "cpu")
    llm = random_llm(llm_config, max_seq_len, "cpu")
    return Case(step_config, llm, torch.randn(TOKENS, llm_config.hidden_size))


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_padding_and_cuts_change_no_bit(case: Case, dtype: str) -> None:
    whole = case.append(dtype, [TOKENS])
    for pieces, lengths in (([TOKENS], [96]), ([2, 36, 2], None), ([17, 10, 13], [32])):
        found = case.append(dtype, pieces, lengths)
        assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True)), pieces


@pytest.mark.parametrize("tokens", [3, 70, 270])
def test_graphs_give_the_bits_of_launches(tokens: int, emulated_device: EmulatedDevice) -> None:
    """The longest goes through weights in float16, which torch multiplies."""
    emulated_device.capability = NEWEST
    torch.manual_seed(0)
    case = small(NEWEST, max(64, tokens + 2))
    parts = replace(case.config, device="cuda"), case.llm, torch.nn.Identity(), ALL_FP16
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = True
    session = NativeSession.of_parts(*parts)  # type: ignore[arg-type]
    assert not matmul.allow_fp16_reduced_precision_reduction, "cuBLAS might add in float16"
    prompts = session._prompts
    embeds = np.random.default_rng(0).standard_normal((tokens, 128), np.float32)
    logits = session.prefill(embeds)
    assert session.position == int(session._cache.position) == tokens
    replayed = session.decode(7)
    graphs, finish = prompts._graphs, prompts._finish
    assert list(graphs) == prompts._lengths[::-1]
    prompts._graphs, prompts._finish = {}, None
    session.truncate(0)
    np.testing.assert_array_equal(session.prefill(embeds), logits)
    np.testing.assert_array_equal(session.decode(7), replayed)
    # Again, with what another prompt has left in the buffers.
    session.truncate(0)
    session.prefill(embeds[::-1])
    prompts._graphs, prompts._finish = graphs, finish
    session.truncate(0)
    np.testing.assert_array_equal(session.prefill(embeds), logits)
