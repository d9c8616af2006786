"""Kernels that follow each other in other ways: the same bits, and no way where none leads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.native_cases import rounded
from tests.support.paths import TINY_VILA
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, Sizes
from vila_deploy.backends.native.weights import PackedLlm, pack_llm
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.pdl import Boundaries
from vila_deploy.utils.errors import VilaDeployError

SLOTS, POSITION, TOKEN = 32, 9, 30
Model = tuple[LlmConfig, PackedLlm]


@pytest.fixture(scope="module")
def model() -> Model:
    """tiny-vila's decoder, its linears rounded to 4 bits."""
    checkpoint = rounded(open_checkpoint(TINY_VILA))
    config = checkpoint.config.llm
    return config, pack_llm(config, checkpoint.llm, SLOTS, lambda name: None)


def make(model: Model, boundaries: Boundaries, device: str = "cpu", sm: int = 0) -> Any:
    config, llm = model
    cache = Cache(config, SLOTS, device)
    step = DecodeStep(Sizes(config, SLOTS, sm, device, boundaries), llm, cache)
    return step, cache


def run(model: Model, boundaries: Boundaries) -> list[torch.Tensor]:
    """What a step leaves behind some tokens of which the cache is full of noise."""
    step, cache = make(model, boundaries)
    random = torch.Generator().manual_seed(0)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=random))
    cache.values.copy_(torch.randn(cache.values.shape, generator=random))
    cache.position.fill_(POSITION)
    step.token.fill_(TOKEN)
    step()
    return [step.logits, step.token, cache.keys, cache.values, cache.position, cache.history]


@pytest.fixture(scope="module")
def separate(model: Model) -> list[torch.Tensor]:
    return run(model, Boundaries())


@pytest.mark.parametrize(
    "boundaries", [Boundaries(overlap=True, merge=True), Boundaries(join=True, merge=True)]
)
def test_a_step_of_tiny_vila_has_the_same_bits(
    model: Model, separate: list[torch.Tensor], boundaries: Boundaries
) -> None:
    assert separate[0].isfinite().all()
    found = run(model, boundaries)
    assert all(torch.equal(*pair) for pair in zip(found, separate, strict=True))


def names(model: Model, boundaries: Boundaries) -> list[str]:
    step, _ = make(model, boundaries, sm=90)
    return [launch.name.removesuffix("_kernel") for launch in step.launches]


def test_what_a_step_launches(model: Model) -> None:
    """Four layers: three of them end in what the next one begins with."""
    ends = ["add_residual", "gate_up", "add_residual", "head", "pick"]
    whole = names(model, Boundaries())
    assert (len(whole), whole[-5:]) == (6 * 4 + 3, ends)
    attends = ["attention_part", "attention_merge"]
    joined = names(model, Boundaries(join=True))
    assert joined == ["embed", "norm_qkv", *attends, *(["joined", *attends] * 3), *ends]
    joined = names(model, Boundaries(join=True, merge=True))
    assert joined == ["embed", "norm_qkv", "attention", *(["joined", "attention"] * 3), *ends]
    assert len(names(model, Boundaries(merge=True))) == 5 * 4 + 3


def test_what_a_device_cannot_do_is_refused(model: Model) -> None:
    for sm in (0, 90, 120):
        Boundaries(overlap=True, merge=True).check(sm)
    with pytest.raises(VilaDeployError, match=r"needs compute capability 9\.0, this is 8\.9"):
        make(model, Boundaries(overlap=True), sm=89)
    with pytest.raises(VilaDeployError, match="choose one"):
        Boundaries(overlap=True, join=True).check(90)
