"""Heads in 8 and 4 bits, the cache in 8, sampling, and parts in host memory, interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.support.native_cases import TOLERANCE, built, deviation, rounded
from tests.support.paths import TINY_VILA
from tests.support.plans import advise, plan_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import open_session
from vila_deploy.backends.native import weights as weights_module
from vila_deploy.backends.native.build import host_parts
from vila_deploy.backends.native.decode_step import Cache
from vila_deploy.backends.native.memory import EMBEDDINGS, VISION
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.backends.native.weights import empty_llm, pack_head
from vila_deploy.backends.registry import get_backend
from vila_deploy.builder.resolve import check_module_precision
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import OneSlot
from vila_deploy.engine.target import get_target
from vila_deploy.kernels.kv_int8 import dequantize_vectors, quantize_vectors
from vila_deploy.kernels.packed_linear import unpack
from vila_deploy.kernels.sample import sample_reference
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.onnx_export.rounding import round_int4
from vila_deploy.runtime.generate import generate

GIB = 1 << 30


@dataclass(frozen=True)
class WithHead:
    """A WeightSource with another lm_head."""

    source: Any
    head: torch.Tensor

    def tensor(self, name: str) -> torch.Tensor:
        return self.head if name == "lm_head.weight" else self.source.tensor(name)

    def linear(self, prefix: str) -> Any:
        return self.source.linear(prefix)


def with_head(checkpoint: Any, head: torch.Tensor) -> Any:
    return SimpleNamespace(
        config=checkpoint.config, llm=WithHead(checkpoint.llm, head), vision=checkpoint.vision,
        projector=checkpoint.projector,
    )  # fmt: skip


def greedy(session: Any, prompt: Sequence[int], count: int) -> list[int]:
    return list(generate(OneSlot(session), session.embed_tokens(prompt), (), SamplingParams(count)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One decoder layer of random weights in 4 bits, two query heads to a key head."""
    root = tmp_path_factory.mktemp("small") / "c"
    return open_checkpoint(
        make_checkpoint(root, quantized=True, kv_heads=2, layers=1, vision_layers=5)
    )


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_a_head_packed_in_pieces_is_the_whole_head(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(200, 384, generator=torch.Generator().manual_seed(1)).half()
    whole = unpack(pack_head(weight, dtype))
    monkeypatch.setattr(weights_module, "HEAD_ROWS", 64)
    assert torch.equal(unpack(pack_head(weight, dtype)), whole)
    if dtype == "int4":
        assert torch.equal(whole, round_int4(weight, 128, "lm_head").dequantize())
    levels = {"fp16": 1 << 30, "int8": 127, "int4": 7}[dtype]
    most = weight.float().unflatten(1, (-1, 128)).abs().amax(2).repeat_interleave(128, 1)
    assert ((whole - weight.float()).abs() <= most / levels * 0.51).all()


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 16), ("int8", 8.25), ("int4", 4.25)])
def test_bytes_of_a_step_count_the_head_as_it_is_kept(dtype: str, bits: float) -> None:
    config = preset("Llama-3-VILA1.5-8B", "int4").llm
    found = empty_llm(config, 8, lm_head=dtype).bytes_per_step
    without = empty_llm(replace(config, vocab_size=32), 8, lm_head=dtype).bytes_per_step
    assert found - without == (config.vocab_size - 32) * config.hidden_size * bits / 8


def test_tokens_of_a_head_in_4_bits_are_the_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained model; the reference has the same head dequantized."""
    checkpoint = rounded(open_checkpoint(TINY_VILA))
    head = checkpoint.llm.tensor("lm_head.weight")
    manifest = built(
        tmp_path / "engine",
        checkpoint,
        monkeypatch,
        module_precision=ModulePrecision(lm_head="int4"),
    )
    session = open_session(tmp_path / "engine", manifest).sequence
    reference = ReferenceSession(
        with_head(checkpoint, round_int4(head, 128, "lm_head").dequantize())
    )
    prompt = [1, 40, 77, 12, 300]
    expected = greedy(reference, prompt, 4)
    assert greedy(session, prompt, 4) == expected
    assert session._llm.head.bits == 4
    saved = head.numel() * (16 - 4.25) / 8
    plain = empty_llm(checkpoint.config.llm, 8).bytes_per_step
    assert manifest.weight_bytes_per_token == plain - saved
    wanted = reference.decode(expected[-1])
    assert deviation(session.decode(expected[-1]), wanted) < TOLERANCE


@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_an_odd_number_of_tokens_has_the_references_logits(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, kv_heads=2, layers=1, vocab=401)
    checkpoint = open_checkpoint(root)
    precision = ModulePrecision(lm_head=dtype)
    manifest = built(tmp_path / "engine", checkpoint, monkeypatch, 16, precision)
    session = open_session(tmp_path / "engine", manifest).sequence
    head = unpack(pack_head(checkpoint.llm.tensor("lm_head.weight"), dtype))
    reference = ReferenceSession(with_head(checkpoint, head[:401]))
    found, wanted = (s.prefill(s.embed_tokens([1, 40, 400])) for s in (session, reference))
    assert found.shape == wanted.shape == (401,)
    assert deviation(found, wanted) < TOLERANCE
    assert deviation(session.decode(400), reference.decode(400)) < TOLERANCE


class RoundedCache(DynamicCache):
    """transformers' cache with what goes into it rounded to 8 bits."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> Any:
        both = (
            dequantize_vectors(*quantize_vectors(part.half())).float() for part in (keys, values)
        )
        return super().update(*both, *rest)


def test_a_cache_in_8_bits_is_the_references_and_hardly_moves_the_logits(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt in two parts, then a token; the head is in 8 bits on both sides."""
    module_precision = ModulePrecision(lm_head="int8", kv_cache="int8")
    manifest = built(tmp_path / "engine", small, monkeypatch, 24, module_precision)
    session = open_session(tmp_path / "engine", manifest).sequence
    head = unpack(pack_head(small.llm.tensor("lm_head.weight"), "int8"))
    whole, reference = (ReferenceSession(with_head(small, head)) for _ in range(2))
    reference._cache = RoundedCache()
    embeds = reference.embed_tokens(range(3, 17))
    wanted, plain = ([each.prefill(embeds), each.decode(7)] for each in (reference, whole))
    session.prefill(embeds[:9])
    assert session._cache.keys.dtype == torch.int8
    found = [session.prefill(embeds[9:]), session.decode(7)]
    for logits, right, unrounded in zip(found, wanted, plain, strict=True):
        assert deviation(logits, right) < TOLERANCE
        assert np.linalg.norm(logits - unrounded) / np.linalg.norm(unrounded) < 0.015
        assert deviation(right, unrounded) > TOLERANCE / 4  # there is something to see


def test_a_cache_in_8_bits_takes_little_more_than_half() -> None:
    config = preset("VILA1.5-3b", "int4").llm
    whole, small = (Cache(config, 16, "meta", kind).bytes_per_token for kind in ("fp16", "int8"))
    assert whole == 320 << 10
    assert small == whole / 2 * (1 + 2 / 128)


def test_drawn_tokens_follow_the_numbers_of_their_positions(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device draws what the rule of the host draws of the reference's logits."""
    manifest = built(tmp_path / "engine", small, monkeypatch, 24)
    session, reference = NativeSession(tmp_path / "engine", manifest), ReferenceSession(small)
    sampling, prompt = SamplingParams(5, temperature=0.9, top_p=0.8, seed=3), [4, 9, 2]
    embeds = session.embed_tokens(prompt)
    found = list(generate(OneSlot(session), embeds, (), sampling))
    assert session.position == int(session._cache.position) == len(prompt) + 4

    logits, expected = reference.prefill(embeds), []
    numbers = torch.rand(25, generator=torch.Generator().manual_seed(3))
    for position in range(len(prompt), len(prompt) + 5):
        row = torch.from_numpy(logits)
        expected.append(sample_reference(row, float(numbers[position]), 0.9, 0.8))
        logits = reference.decode(expected[-1])
    assert found == expected
    assert expected != greedy(session, prompt, 5)
    assert list(generate(OneSlot(session), embeds, (), sampling)) == found
    # A stop token ends it, and what ran ahead of it is forgotten.
    monkeypatch.setattr(type(session), "_ahead", 1)
    assert list(generate(OneSlot(session), embeds, (found[2],), sampling)) == found[:3]
    assert session.position == int(session._cache.position) == len(prompt) + 2


def test_parts_in_host_memory_give_the_same_bits(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a card without room for them gets: table and tower stay outside."""
    rows = []
    pixels = np.random.default_rng(0).standard_normal(
        (1, 3, *[small.config.vision.image_size] * 2), np.float32
    )
    card = replace(get_target("h100"), memory_bytes=1)
    for name, target, kept in (("all", None, ()), ("few", card, (EMBEDDINGS, VISION))):
        manifest = built(tmp_path / name, small, monkeypatch, 24, target=target)
        session = open_session(tmp_path / name, manifest).sequence
        hooks = [len(x._forward_pre_hooks) for x in session._vision.tower.encoder.layers]
        assert set(hooks) == {1 if kept else 0}
        features = session.encode_images(pixels)
        rows.append((features, session.prefill(session.embed_tokens([3, 5])), session.decode(7)))
    for plain, outside in zip(*rows, strict=True):
        assert np.array_equal(plain, outside)


def test_layers_of_a_streamed_tower_leave_behind_themselves(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = replace(get_target("h100"), memory_bytes=1)
    session = open_session(
        tmp_path / "few", built(tmp_path / "few", small, monkeypatch, 24, target=card)
    ).sequence
    layers = [*session._vision.tower.encoder.layers]
    at_home = [next(layer.parameters()).data_ptr() for layer in layers]
    seen: list[list[bool]] = []
    layers[1].register_forward_hook(
        lambda module, inputs, output: seen.append(
            [
                next(x.parameters()).data_ptr() == home
                for x, home in zip(layers, at_home, strict=True)
            ]
        ),
        prepend=True,
    )
    size = small.config.vision.image_size
    session.encode_images(np.zeros((1, 3, size, size), np.float32))
    assert seen == [[index != 1 for index in range(len(layers))]]
    assert [next(layer.parameters()).data_ptr() for layer in layers] == at_home


def test_40b_fits_one_card_of_24_gb() -> None:
    config, card = preset("VILA1.5-40b", "int4"), get_target("rtx4090")
    limits, module_precision = Limits(1, 2048, 2048), ModulePrecision(lm_head="int4")
    plan = plan_engine(config, card, "native", "int4", limits, module_precision)
    assert plan.fits
    assert plan.device_bytes <= 22.5 * GIB
    assert plan.in_host_memory == (EMBEDDINGS, VISION)
    assert host_parts(config, BuildRequest(card, limits, module_precision=module_precision)) == (
        EMBEDDINGS,
        VISION,
    )
    sizes = {part.name: part for part in plan.items.values()}
    assert sizes["llm decoder linears"].bits == sizes["llm head"].bits == 4.25
    # The kernels' own count of a step's weights, norms left out.
    packed = empty_llm(config.llm, 8, lm_head="int4").bytes_per_step
    planned = sum(sizes[name].bytes for name in ("llm decoder linears", "llm head"))
    assert packed - planned == 4 * 7168 * 121


@pytest.mark.parametrize(("model", "target"), [("VILA1.5-40b", "h100"), ("VILA1.5-3b", "orin")])
def test_nothing_moves_where_there_is_room_or_only_one_memory(model: str, target: str) -> None:
    plan = plan_engine(
        preset(model, "int4"), get_target(target), "native", "int4", Limits(1, 1024, 1024)
    )
    assert plan.fits
    assert plan.in_host_memory == ()


def test_a_card_that_its_default_backend_overfills_is_told_of_this_one() -> None:
    config, card, limits = (
        preset("VILA1.5-40b", "int4"),
        get_target("rtx4090"),
        Limits(1, 2048, 2048),
    )
    assert card.default_backend != "native"
    usual = card.default_backend
    assert advise(config, "int4", limits, card, usual) == "vila-build-engine --backend native"
    assert "native" not in advise(config, "int4", limits, get_target("orin-nano"), "tensorrt")


def test_what_this_backend_can_keep_otherwise() -> None:
    modules = ModulePrecision(lm_head="int4", kv_cache="int8")
    check_module_precision(get_target("h100"), get_backend("native"), modules)
