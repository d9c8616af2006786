"""The native backend in Triton's interpreter against the PyTorch reference of the same weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_cases  # noqa: F401  sets TRITON_INTERPRET
import numpy as np
import pytest
import torch
from tiny import make_checkpoint

from vila_deploy.backends.native import build as build_module
from vila_deploy.backends.native import files, open_session
from vila_deploy.backends.native import session as session_module
from vila_deploy.backends.native.model_file import read_model, write_model
from vila_deploy.backends.native.step import Cache, DecodeStep, Sizes
from vila_deploy.backends.native.weights import (
    Norm,
    empty_llm,
    map_tensors,
    pack_joined,
    pack_llm,
    part_names,
    tensors,
)  # fmt: skip
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.llm_config import QuantizationConfig
from vila_deploy.engine.description import describe
from vila_deploy.engine.manifest import Limits, Manifest
from vila_deploy.engine.request import BuildRequest
from vila_deploy.engine.target import get_target
from vila_deploy.errors import VilaDeployError
from vila_deploy.model.presets import preset
from vila_deploy.model.random_weights import random_parts
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.quantize.round import round_to_nearest
from vila_deploy.quantize.scheme import QuantScheme

TINY_VILA = Path(__file__).resolve().parents[2] / "examples" / "tiny-vila" / "checkpoint"
SLOTS, NEW_TOKENS, GROUP = 160, 5, 128
# Of the logits' spread; float16 activations differ by 2e-3 to 7e-3 here.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Rounded:
    """A float WeightSource whose decoder linears are rounded to 4 bits."""

    source: Any

    def tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name)

    def linear(self, prefix: str) -> Any:
        return round_to_nearest(self.source.linear(prefix).float(), QuantScheme(GROUP))


def rounded(checkpoint: Any) -> Any:
    quantization = QuantizationConfig("awq", 4, GROUP, True, "gemm")
    config = checkpoint.config
    return SimpleNamespace(
        config=replace(config, llm=replace(config.llm, quantization=quantization)),
        llm=Rounded(checkpoint.llm), vision=checkpoint.vision, projector=checkpoint.projector,
    )  # fmt: skip


def built(
    folder: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, slots: int = SLOTS
) -> Manifest:
    """Builds without compiling, which test_kernel_aot.py does."""
    asked: list[Any] = []
    monkeypatch.setattr(build_module, "compile_engine", lambda *args: asked.append(args) or [])
    folder.mkdir()
    request = BuildRequest(get_target("h100"), Limits(1, slots, slots))
    parts = (checkpoint.llm, checkpoint.vision, checkpoint.projector)
    found = build_module.build(folder, checkpoint.config, *parts, request)
    assert asked == [(checkpoint.config.llm, slots, ["9.0"])]
    return Manifest(
        name="tiny", target="h100", backend="native", precision="int4", weights="trained",
        weight_bytes_per_token=found.weight_bytes_per_token, checkpoint_fingerprint=None,
        limits=request.limits, model=describe(checkpoint.config, None), versions=found.versions,
    )  # fmt: skip


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())


def test_tiny_vila_gives_the_references_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained model in 4 bits: picture, prompt and a whole greedy decode on the device side."""
    checkpoint = rounded(open_checkpoint(TINY_VILA))
    manifest = built(tmp_path / "engine", checkpoint, monkeypatch)
    session = open_session(tmp_path / "engine", manifest)
    reference = ReferenceSession(checkpoint)
    size = checkpoint.config.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    features, expected = (s.encode_images(pixels)[0] for s in (session, reference))
    assert deviation(features, expected) < TOLERANCE
    embeds = np.concatenate([reference.embed_tokens([1, 5]), expected, session.embed_tokens([9])])

    logits, wanted = session.prefill(embeds), reference.prefill(embeds)
    assert deviation(logits, wanted) < TOLERANCE
    tokens = [int(wanted.argmax())]
    assert int(logits.argmax()) == tokens[0]
    for _ in range(NEW_TOKENS):
        wanted = reference.decode(tokens[-1])
        tokens.append(int(wanted.argmax()))
    assert session.decode_greedy(NEW_TOKENS) == tokens[1:]
    assert deviation(session._logits(), wanted) < TOLERANCE
    assert session.position == reference.position == int(session._cache.position)


def test_decode_prefill_in_parts_and_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2 with biases, grouped queries, float16 and an odd width, fed by the host."""
    root = make_checkpoint(
        tmp_path / "c", qwen2=True, kv_heads=2, layers=1, intermediate=200, tied=True
    )
    checkpoint = open_checkpoint(root)
    manifest = built(tmp_path / "engine", checkpoint, monkeypatch, 24)
    session, reference = open_session(tmp_path / "engine", manifest), ReferenceSession(checkpoint)
    embeds = reference.embed_tokens(range(3, 17))
    expected = reference.prefill(embeds)
    session.prefill(embeds[:9])
    assert deviation(session.prefill(embeds[9:]), expected) < TOLERANCE
    assert deviation(session.decode(7), reference.decode(7)) < TOLERANCE
    assert session.position == 15
    with pytest.raises(VilaDeployError, match="25 tokens don't fit into the 24 positions"):
        session.prefill(embeds[:10])
    session.reset()
    with pytest.raises(VilaDeployError, match="empty"):
        session.prefill(embeds[:0])
    monkeypatch.setattr("vila_deploy.backends.native.prefill.CHUNK", 11)
    again = session.prefill(embeds)
    assert deviation(again, expected) < TOLERANCE
    session.close()


def test_several_tokens_of_a_step_see_those_before(tmp_path: Path) -> None:
    """What verifying guessed tokens needs: a step over three tokens equals three steps."""
    root = make_checkpoint(tmp_path / "c", quantized=True, kv_heads=1, layers=1)
    checkpoint = open_checkpoint(root)
    config = checkpoint.config.llm
    llm = pack_llm(config, checkpoint.llm, 16, lambda name: None)
    sizes, cache = Sizes(config, 16, 0, "cpu"), Cache(config, 16, "cpu")
    step = DecodeStep(sizes, llm, cache, tokens=3)
    step.token.copy_(torch.tensor([4, 9, 2], dtype=torch.int32))
    step()
    reference = ReferenceSession(checkpoint)
    expected = [reference.decode(token) for token in (4, 9, 2)]
    for row, wanted in zip(step.logits.numpy(), expected, strict=True):
        assert deviation(row, wanted) < TOLERANCE
    assert step.token.tolist() == [int(wanted.argmax()) for wanted in expected]
    assert int(cache.position) == 0


def test_packed_llm_is_described_by_its_sizes() -> None:
    whole = preset("NVILA-8B", "int4")
    config = replace(whole.llm, num_layers=1, vocab_size=64, intermediate_size=1152)
    weights = random_parts(replace(whole, llm=config))[0]
    llm = pack_llm(config, weights, 8, lambda name: None)
    real, empty = tensors(llm), tensors(empty_llm(config, 8))
    assert real.keys() == empty.keys()
    for name in real:
        assert (real[name].shape, real[name].dtype) == (empty[name].shape, empty[name].dtype), name
    doubled = map_tensors(llm, lambda name, tensor: tensor * 2)
    assert torch.equal(doubled.layers[0].qkv.words, llm.layers[0].qkv.words * 2)
    assert doubled.layers[0].qkv.bits == 4


def test_bytes_of_a_step_of_vila_3b() -> None:
    """4.25 bits a weight, lm_head in float16: 1.51 GB."""
    config = preset("VILA1.5-3b", "int4").llm
    found = empty_llm(config, 1024).bytes_per_step
    linears = config.num_layers * 2560 * (4 * 2560 + 3 * 6912)
    assert found == linears * 4.25 / 8 + 2 * 32000 * 2560 + 4 * 2560 * 65


@pytest.mark.parametrize("model", ["VILA1.5-3b", "NVILA-Lite-8B", "VILA1.5-40b", "VILA-7b"])
@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_model_file_comes_back(tmp_path: Path, model: str, precision: str) -> None:
    config = preset(model, precision)
    write_model(tmp_path / "model.json", config, {"rest": {"norm": 2.0}})
    assert read_model(tmp_path / "model.json") == (config, {"rest": {"norm": 2.0}})


def test_norms_are_scaled_to_at_most_one() -> None:
    norm = Norm.of(torch.tensor([0.1, -5.0, 3.0]))
    assert norm.unit == 8.0
    assert torch.equal(norm.weight * norm.unit, torch.tensor([0.1, -5.0, 3.0]))
    assert Norm.of(torch.tensor([0.3])).unit == Norm.of(torch.zeros(2)).unit == 1.0


def test_what_has_no_kernel_is_refused() -> None:
    config, request = (
        preset("VILA1.5-3b", "int4"),
        BuildRequest(get_target("h100"), Limits(1, 8, 8)),
    )
    build_module.check(config, request)
    with pytest.raises(VilaDeployError, match="--tp"):
        build_module.check(config, replace(request, tp=2))
    assert config.llm.quantization is not None
    odd = replace(config.llm, quantization=replace(config.llm.quantization, group_size=96))
    with pytest.raises(VilaDeployError, match=r"found 96.*--group-size"):
        build_module.check(replace(config, llm=odd), request)
    wide = replace(config.llm, num_heads=34, num_kv_heads=2)
    with pytest.raises(VilaDeployError, match="17"):
        build_module.check(replace(config, llm=wide), request)
    linear = random_parts(config)[0].linear("model.layers.0.mlp.up_proj")
    scaled = replace(linear, prequant_scale=torch.ones(2560, dtype=torch.float16))
    with pytest.raises(VilaDeployError, match=r"model\.layers\.0"):
        pack_joined([scaled], "model.layers.0")


def test_without_a_gpu_the_session_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(VilaDeployError, match="TRITON_INTERPRET=1"):
        session_module.find_device()


def test_equal_checkpoints_give_equal_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    for name in ("first", "second"):
        built(tmp_path / name, checkpoint, monkeypatch)
    parts = [f"{files.LLM}/{files.part(name)}" for name in part_names(checkpoint.config.llm)]
    for name in (*parts, files.VISION, files.MODEL, files.KERNELS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert json.loads((tmp_path / "first" / files.KERNELS).read_text()) == {"kernels": []}
