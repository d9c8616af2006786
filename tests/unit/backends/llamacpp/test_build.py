"""Engines for llama.cpp: their GGUF file holds the checkpoint's weights; plans count its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from tests.support.commands import assert_one_line, invoke, succeed
from tests.support.conversions import effective_weights
from tests.support.mixed_bits import make_mixed_checkpoint
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.llamacpp.gpu_layers import layers_that_fit
from vila_deploy.backends.llamacpp.memory import estimate_memory
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.gguf_layout import row_order, tensor_specs
from vila_deploy.checkpoint.llm_config import HEAD
from vila_deploy.engine.build_request import BuildRequest, resolve_limits
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.engine.memory import MemoryRow
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.target import get_target
from vila_deploy.formats.gguf_file import read_header

BUILD = "vila-build-engine"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama": ({"quantized": True}, {}),
    "Llama on a GPU": ({"quantized": True, "group_size": 32}, {"target": "metal"}),
    "Llama, int8 head": ({"quantized": True, "kv_heads": 2}, {"lm_head": "int8"}),
    "Qwen2, tied, int8 head": (
        {"quantized": True, "qwen2": True, "tied": True},
        {"lm_head": "int8"},
    ),
    "fp16": ({"dtype": torch.bfloat16}, {}),
    "4, 5 and 8 bits": ({"mixed": True}, {}),
    "4, 5 and 8 bits on a GPU, symmetric": (
        {"mixed": True, "symmetric": True},
        {"target": "metal"},
    ),
}


def make(folder: Path, mixed: bool = False, **changes: Any) -> Path:
    if mixed:
        return make_mixed_checkpoint(folder, "gguf", **changes)
    return make_checkpoint(folder / "c", **changes)


def build(root: Path, out: Path, *options: str, target: str = "cpu") -> Path:
    succeed(BUILD, root, "--target", target, "--backend", "llamacpp", "-o", out, *options)
    return out / "llm" / "model.gguf"


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_checkpoints(case: str, tmp_path: Path) -> None:
    made, modules = CASES[case]
    root = make(tmp_path, **made)
    head, target = modules.get("lm_head", "fp16"), modules.get("target", "cpu")
    options = ("--lm-head", head, "--vision", "fp16")
    file = build(root, tmp_path / "e", *options, target=target)
    config, expected = open_checkpoint(root).config.llm, effective_weights(open_checkpoint(root))
    names = {spec.name: spec.source for spec in tensor_specs(config)} | {"output.weight": HEAD}
    for tensor in GGUFReader(file).tensors:
        found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        name = names[tensor.name]
        wanted = expected[name if name in expected else "model.embed_tokens.weight"].float()
        order = row_order(config, name)
        wanted = wanted if order is None else wanted[order]
        # Of an int8 head all values are rounded, of Q4_1 and Q5_1 the offsets.
        rounded = {"Q8_0": 1e-2, "Q4_1": 2e-3, "Q5_1": 2e-3, "F16": 1e-6}
        margin = rounded.get(tensor.tensor_type.name, 0) * wanted.abs().max()
        assert (found - wanted).abs().max() <= margin, tensor.name
    assert load_manifest(tmp_path / "e").module_precision.lm_head == head


@pytest.mark.parametrize("case", CASES)
def test_a_plan_counts_the_bytes_of_the_file(case: str, tmp_path: Path) -> None:
    made, modules = CASES[case]
    root = make(tmp_path, **made)
    target = modules.get("target", "cpu")
    head = modules.get("lm_head", "fp16")
    options = ("--lm-head", head, "--vision", "fp16")
    file = build(root, tmp_path / "e", *options, target=target)
    manifest = load_manifest(tmp_path / "e")
    config = open_checkpoint(root).config
    request = BuildRequest(
        get_target(target), resolve_limits(config), module_precision=manifest.module_precision
    )
    items = estimate_memory(config, request, manifest.precision, 1 << 40).items
    rows = (MemoryRow.DECODER_LINEARS, MemoryRow.EMBEDDINGS, MemoryRow.HEAD, MemoryRow.NORMS)
    planned = sum(items[row].bytes for row in rows)
    tensors = read_header(file).tensors.values()
    biases = sum(tensor.bytes for tensor in tensors if tensor.name.endswith("bias"))
    found = sum(tensor.bytes for tensor in tensors) - biases
    if config.llm.tie_word_embeddings and manifest.module_precision.lm_head == "fp16":
        found += items[MemoryRow.HEAD].bytes
    assert planned == found
    table = items[MemoryRow.EMBEDDINGS].bytes
    assert manifest.weight_bytes_per_token == planned - table + biases


def test_a_gpu_holds_the_last_layers_first() -> None:
    sizes = {"token_embd.weight": 50, "output.weight": 30}
    sizes |= {f"blk.{index}.attn_q.weight": 10 for index in range(4)}
    sizes |= {f"blk.{index}.attn_norm.weight": 1 for index in range(4)}
    counts = {room: layers_that_fit(sizes, 9, room) for room in (29, 30, 49, 50, 89, 90, 109, 110)}
    assert counts == {29: 0, 30: 1, 49: 1, 50: 2, 89: 3, 90: 4, 109: 4, 110: 5}


def test_a_plan_leaves_on_the_host_what_a_gpu_has_no_room_for(tmp_path: Path) -> None:
    config = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True, layers=4)).config

    def needed(limit: int, layers: int | None = None, target: str = "vulkan") -> Any:
        request = BuildRequest(
            get_target(target), resolve_limits(config), module_precision=ModulePrecision(),
            gpu_layers=layers,
        )  # fmt: skip
        return estimate_memory(config, request, "int4", limit)

    everything = needed(1 << 40)
    assert "vision tower" in everything.in_host_memory
    assert "llm decoder linears" not in everything.in_host_memory
    less = everything.device_bytes - everything.items[MemoryRow.DECODER_LINEARS].bytes // 2
    part = needed(less)
    assert part.device_bytes <= less
    assert part.in_host_memory["llm decoder linears"] > 0
    assert needed(1 << 40, layers=0).device_bytes < needed(1 << 40, layers=3).device_bytes
    assert needed(1 << 40, layers=3).device_bytes < everything.device_bytes
    # Apple's GPUs share the computer's memory.
    assert needed(1 << 40, target="metal").in_host_memory == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "cpu", "--gpu-layers", "3"), "target cpu is none"),
        (("--target", "h100", "--backend", "native", "--gpu-layers", "3"), "for backend llamacpp"),
        (("--target", "a100", "--memory", "8"), "--memory is for targets without a size"),
        (("--target", "metal", "--memory", "0.1"), "metal has 0.1 GB"),
        (("--target", "cpu", "--lm-head", "int4"), "--lm-head fp16 or int8"),
    ],
)
def test_options_that_can_not_be(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, layers=1)
    backend = () if "--backend" in options else ("--backend", "llamacpp")
    result = invoke(BUILD, root, "-o", tmp_path / "e", *backend, *options)
    words = words.replace("metal has", "GPU of an Apple computer (Metal) has")
    assert words in assert_one_line(result)
    assert not (tmp_path / "e").exists()


def test_memory_and_layers_of_a_plan(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, layers=2)
    result = succeed(BUILD, root, "--target", "vulkan", "--memory", "8", "--plan")
    assert " of 8.0 GB: fits" in result
    assert "metal" not in result
    file = build(root, tmp_path / "e", "--gpu-layers", "0", target="metal")
    assert file.is_file()
    assert load_manifest(tmp_path / "e").gpu_layers == 0


def test_groups_of_16_are_refused(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, layers=1, group_size=16)
    result = invoke(BUILD, root, "--target", "cpu", "--backend", "llamacpp", "-o", tmp_path / "e")
    assert "a scale for 32 weights" in assert_one_line(result)
