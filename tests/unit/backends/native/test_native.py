"""The native backend in Triton's interpreter against the PyTorch reference of the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.native_cases import TOLERANCE, built, deviation, pack_llm
from tests.support.session_contract import check_session
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import files, loading, open_session
from vila_deploy.backends.native.backend import BACKEND
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.model_file import ModelFile, read_model, write_model
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.backends.native.weights import (
    Norm,
    empty_llm,
    map_tensors,
    pack_concatenated,
    shard_names,
    tensors,
)  # fmt: skip
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.target import get_target
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.launch_mode import AUTOMATIC
from vila_deploy.model.random_weights import random_weights
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.utils.errors import VilaDeployError


def test_decode_prefill_in_parts_and_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2 with biases, grouped queries, linear rope, float16, an odd width, fed by the host."""
    root = make_checkpoint(
        tmp_path / "c", qwen2=True, kv_heads=2, layers=1, intermediate=200, tied=True,
        llm_config={"rope_scaling": {"type": "linear", "factor": 4.0}},
    )  # fmt: skip
    checkpoint = open_checkpoint(root)
    manifest = built(tmp_path / "engine", checkpoint, monkeypatch, 24)
    session, reference = open_session(tmp_path / "engine", manifest), ReferenceSession(checkpoint)
    embeds = reference.embed_tokens(range(3, 17))
    expected = reference.prefill(embeds)
    session.prefill(0, embeds[:9])
    assert deviation(session.prefill(0, embeds[9:]), expected) < TOLERANCE
    assert deviation(session.decode([0], [7])[0], reference.decode(7)) < TOLERANCE
    assert session.length(0) == 15
    with pytest.raises(VilaDeployError, match="25 tokens don't fit into the 24 positions"):
        session.prefill(0, embeds[:10])
    session.keep(0, 0)
    with pytest.raises(VilaDeployError, match="empty"):
        session.prefill(0, embeds[:0])
    monkeypatch.setattr("vila_deploy.backends.native.prompts.PREFILL_TOKENS", 11)
    again = session.prefill(0, embeds)
    assert deviation(again, expected) < TOLERANCE
    session.close()


def test_it_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", kv_heads=2, layers=1))
    manifest = built(tmp_path / "engine", checkpoint, monkeypatch, 24)
    session = open_session(tmp_path / "engine", manifest)
    check_session(session, ReferenceSession(checkpoint), TOLERANCE)


def test_several_tokens_of_a_step_see_those_before(tmp_path: Path) -> None:
    """What verifying guessed tokens needs: a step over three tokens equals three steps."""
    root = make_checkpoint(tmp_path / "c", quantized=True, kv_heads=1, layers=1)
    checkpoint = open_checkpoint(root)
    config = checkpoint.config.llm
    llm = pack_llm(config, checkpoint.llm, 16)
    cache = Cache(config, 16, "cpu")
    step = DecodeStep(StepConfig(config, 16, INTERPRETER, "cpu"), llm, cache, tokens=3)
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
    weights = random_weights(replace(whole, llm=config)).llm
    llm = pack_llm(config, weights, 8)
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
    written = ModelFile(preset(model, precision), {"rest": {"norm": 2.0}}, ("embeddings",), "pdl")
    write_model(tmp_path / "model.json", written)
    assert read_model(tmp_path / "model.json") == written


def test_model_file_without_a_launch_mode_or_with_an_unknown_one(tmp_path: Path) -> None:
    """Engines of earlier versions have none: it is left open."""
    file = tmp_path / "model.json"
    write_model(file, ModelFile(preset("VILA1.5-3b", "int4"), {}))
    content = json.loads(file.read_text("utf-8"))
    assert content.pop("kernel_launch") == AUTOMATIC
    file.write_text(json.dumps(content), "utf-8")
    assert read_model(file).kernel_launch == AUTOMATIC
    file.write_text(json.dumps({**content, "kernel_launch": "fast"}), "utf-8")
    with pytest.raises(VilaDeployError, match=r"unknown kernel launch mode 'fast'") as error:
        read_model(file)
    assert str(file) in str(error.value)


def test_norms_are_scaled_to_at_most_one() -> None:
    norm = Norm.of(torch.tensor([0.1, -5.0, 3.0]))
    assert norm.prescale == 8.0
    assert torch.equal(norm.weight * norm.prescale, torch.tensor([0.1, -5.0, 3.0]))
    assert Norm.of(torch.tensor([0.3])).prescale == Norm.of(torch.zeros(2)).prescale == 1.0


def test_what_has_no_kernel_is_refused() -> None:
    config, request = (
        preset("VILA1.5-3b", "int4"),
        BuildRequest(get_target("h100"), Limits(1, 8, 8)),
    )
    BACKEND.check(config, request)
    with pytest.raises(VilaDeployError, match=r"needs compute capability 9\.0, this is 8\.9"):
        BACKEND.check(config, replace(request, target=get_target("rtx4090"), kernel_launch="pdl"))
    with pytest.raises(VilaDeployError, match="--tp"):
        BACKEND.check(config, replace(request, tp=2))
    assert config.llm.quantization is not None
    odd = replace(config.llm, quantization=replace(config.llm.quantization, group_size=96))
    with pytest.raises(VilaDeployError, match=r"found 96.*--group-size"):
        BACKEND.check(replace(config, llm=odd), request)
    wide = replace(config.llm, num_heads=34, num_kv_heads=2)
    with pytest.raises(VilaDeployError, match="17"):
        BACKEND.check(replace(config, llm=wide), request)
    linear = random_weights(config).llm.linear("model.layers.0.mlp.up_proj")
    scaled = replace(linear, prequant_scale=torch.ones(2560, dtype=torch.float16))
    with pytest.raises(VilaDeployError, match=r"model\.layers\.0"):
        pack_concatenated([scaled], "model.layers.0")


def test_without_a_gpu_the_session_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(VilaDeployError, match="TRITON_INTERPRET=1"):
        loading.find_device()


def test_another_gpu_than_the_targets_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_device", lambda: ("cuda", ComputeCapability(8, 9)))
    with pytest.raises(VilaDeployError, match=r"h100 with compute capability 9\.0, .* has 8\.9"):
        NativeSession(tmp_path, SimpleNamespace(target="h100"))


def test_equal_checkpoints_give_equal_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    for name in ("first", "second"):
        built(tmp_path / name, checkpoint, monkeypatch)
    names = shard_names(checkpoint.config.llm.num_layers)
    shards = [f"{files.LLM}/{files.shard_file(name)}" for name in names]
    for name in (*shards, files.VISION, files.MODEL, files.KERNELS):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    found = json.loads((tmp_path / "first" / files.KERNELS).read_text())
    assert found == {"components": ALL_FP16.to_json(), "kernels": []}
