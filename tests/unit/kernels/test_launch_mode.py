"""Every launch mode: the same bits as separate launches, and an error where a GPU lacks it."""

from __future__ import annotations

import pytest
import torch

from tests.support.native_cases import pack_llm, rounded
from tests.support.paths import TINY_VILA
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.weights import PackedLlm
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.launch_mode import (
    AUTOMATIC,
    LAUNCH_MODES,
    LaunchMode,
    check_kernel_launch,
    get_launch_mode,
    mode_name,
    possible_modes,
)
from vila_deploy.utils.errors import VilaDeployError

POSITIONS, POSITION, TOKEN = 32, 9, 30
Model = tuple[LlmConfig, PackedLlm]


@pytest.fixture(scope="module")
def model() -> Model:
    """tiny-vila's decoder, its linears rounded to 4 bits."""
    checkpoint = rounded(open_checkpoint(TINY_VILA))
    config = checkpoint.config.llm
    return config, pack_llm(config, checkpoint.llm, POSITIONS)


def make(
    model: Model, mode: LaunchMode, capability: ComputeCapability = INTERPRETER
) -> tuple[DecodeStep, Cache]:
    config, llm = model
    cache = Cache(config, POSITIONS, "cpu")
    step = DecodeStep(StepConfig(config, POSITIONS, capability, "cpu", mode), llm, cache)
    return step, cache


def run(model: Model, mode: LaunchMode) -> list[torch.Tensor]:
    """What a step leaves behind some tokens of which the cache is full of noise."""
    step, cache = make(model, mode)
    random = torch.Generator().manual_seed(0)
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=random))
    cache.values.copy_(torch.randn(cache.values.shape, generator=random))
    cache.position.fill_(POSITION)
    step.token.fill_(TOKEN)
    step()
    return [step.logits, step.token, cache.keys, cache.values, cache.position, cache.history]


@pytest.fixture(scope="module")
def separate(model: Model) -> list[torch.Tensor]:
    return run(model, LaunchMode())


@pytest.mark.parametrize("name", [name for name in LAUNCH_MODES if name != "separate"])
def test_a_step_of_tiny_vila_has_the_same_bits(
    model: Model, separate: list[torch.Tensor], name: str
) -> None:
    assert separate[0].isfinite().all()
    found = run(model, get_launch_mode(name))
    assert all(torch.equal(*pair) for pair in zip(found, separate, strict=True))


def names(model: Model, mode: LaunchMode) -> list[str]:
    step, _ = make(model, mode, ComputeCapability(9, 0))
    return [launch.name.removesuffix("_kernel") for launch in step.launches]


def test_what_a_step_launches(model: Model) -> None:
    """Four layers: three of them end in what the next one begins with."""
    ends = ["add_residual", "gate_up", "add_residual", "head", "argmax"]
    whole = names(model, LaunchMode())
    assert (len(whole), whole[-5:]) == (6 * 4 + 3, ends)
    attends = ["attention_split", "attention_merge"]
    fused = names(model, LaunchMode(fuse_layers=True))
    assert fused == ["embed", "norm_qkv", *attends, *(["fused_layer", *attends] * 3), *ends]
    fused = names(model, LaunchMode(fuse_layers=True, merge_attention=True))
    assert fused == ["embed", "norm_qkv", "attention", *(["fused_layer", "attention"] * 3), *ends]
    assert len(names(model, LaunchMode(merge_attention=True))) == 5 * 4 + 3


@pytest.mark.parametrize("capability", [ComputeCapability(8, 7), ComputeCapability(9, 0)], ids=str)
def test_each_kernel_asks_for_the_weights_of_the_product_behind_it(
    model: Model, capability: ComputeCapability
) -> None:
    mode = LaunchMode(merge_attention=True, prefetch_next=True)
    launches = make(model, mode, capability)[0].launches
    plain = make(model, LaunchMode(merge_attention=True), capability)[0].launches
    products = [launch.args["words_ptr"] for launch in launches if "words_ptr" in launch.args]
    # embed and argmax ask for nothing, and the head has nobody behind it.
    for launch, before in zip(launches[1:-2], plain[1:-2], strict=True):
        words, _, tiles, tile_words, asked, *_ = launch.args["next_weights"]
        if "words_ptr" in launch.args:
            products.pop(0)
        assert words is products[0]
        assert tiles * tile_words == words.numel()
        assert 0 < asked <= tile_words
        share = launch.constants["NEXT_TILES"] * launch.grid[0] * (launch.grid[1:] or (1,))[0]
        assert share >= tiles
        assert before.constants["NEXT_TILES"] == 0
    assert [launch.name for launch in launches[-2:]] == ["head_kernel", "argmax_kernel"]
    assert launches[-2].constants["NEXT_TILES"] == 0


def test_what_a_gpu_lacks_is_refused(model: Model) -> None:
    for capability in (INTERPRETER, ComputeCapability(9, 0), ComputeCapability(12, 0)):
        LaunchMode(pdl=True, merge_attention=True).check(capability)
    with pytest.raises(VilaDeployError, match=r"needs compute capability 9\.0, this is 8\.9"):
        make(model, LaunchMode(pdl=True), ComputeCapability(8, 9))
    with pytest.raises(VilaDeployError, match="choose either"):
        LaunchMode(pdl=True, fuse_layers=True).check(ComputeCapability(9, 0))


def test_unknown_names_are_one_line() -> None:
    with pytest.raises(VilaDeployError, match=r"model.json: unknown .* 'fast'.*auto, separate"):
        check_kernel_launch("fast", "model.json")
    with pytest.raises(VilaDeployError, match=r"unknown kernel launch mode 'auto'.*from separate"):
        get_launch_mode(AUTOMATIC)


def test_left_open_it_is_early_only_where_the_gpu_can() -> None:
    for capability in (INTERPRETER, ComputeCapability(8, 0), ComputeCapability(8, 9)):
        assert possible_modes(AUTOMATIC, capability) == (LaunchMode(),)
    separate, preferred = possible_modes(AUTOMATIC, ComputeCapability(9, 0))
    assert separate == LaunchMode()
    assert preferred.pdl
    assert preferred.merge_attention
    assert mode_name(preferred) == "pdl-merged-attention-prefetch"


@pytest.mark.parametrize("name", LAUNCH_MODES)
def test_what_is_named_is_never_overridden(name: str) -> None:
    assert possible_modes(name, ComputeCapability(9, 0)) == (LAUNCH_MODES[name],)
    assert mode_name(LAUNCH_MODES[name]) == name
