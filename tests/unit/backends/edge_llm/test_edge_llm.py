"""Folders for NVIDIA's exporter, and its step with a stand-in; tests/interop runs the real one."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.baseline_environment import round_checkpoint
from tests.support.commands import assert_one_line, invoke
from tests.support.prompt_cases import write_tokenizer as write_real_tokenizer
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.edge_llm import files
from vila_deploy.backends.edge_llm import tokenizer as edge_tokenizer
from vila_deploy.backends.edge_llm.chat_template import jinja_of
from vila_deploy.backends.edge_llm.tokenizer import write_tokenizer
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.plan import plan_build
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.formats.awq import AWQ_GEMM
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.tokenizer import PROBES, JsonTokenizer, load_tokenizer
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError

SIZES: dict[str, Any] = {
    "hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocab": 401, "layers": 2,
}  # fmt: skip
SYMMETRIC = QuantScheme(128, symmetric=True)
OPTIONS = BuildOptions("orin-nano", "edge-llm", max_seq_len=256)
# Stands for the exporter: checks its arguments, writes what the real one would.
EXPORTER = """#!{python}
import pathlib, sys
source, out, plugin = sys.argv[1:]
assert plugin == "--int4-gemm-plugin-version=1"
assert {{"config.json", "tokenizer.json", "chat_template.jinja"}} <= {{
    path.name for path in pathlib.Path(source).iterdir()}}
fail = pathlib.Path(r"{fail}")
if fail.exists():
    print("06:09:04  ERROR  tensorrt_edgellm: " + fail.read_text())
    sys.exit(1)
llm = pathlib.Path(out) / "llm"
llm.mkdir(parents=True)
for name in {written}:
    (llm / name).write_text(name)
"""


def quantized(folder: Path, format: str = "awq", **changes: Any) -> Path:
    root = make_checkpoint(folder / "fp16", **{**SIZES, **changes})
    return round_checkpoint(root, folder / "int4", [format], SYMMETRIC)


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on PATH; text in the returned file makes it fail."""
    return put_exporter(tmp_path, monkeypatch, [files.GRAPH, files.EMBEDDING])


def put_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]) -> Path:
    tools, fail = tmp_path / "tools", tmp_path / "fail"
    tools.mkdir(exist_ok=True)
    script = tools / "tensorrt-edgellm-export"
    script.write_text(EXPORTER.format(python=sys.executable, fail=fail, written=written))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return fail


@pytest.mark.parametrize("format", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("qwen2", [False, True])
def test_values_and_scales_are_the_checkpoints_bit_for_bit(
    tmp_path: Path, format: str, qwen2: bool
) -> None:
    root = quantized(tmp_path, format, qwen2=qwen2)
    build_engine(root, tmp_path / "e", OPTIONS)
    folder, source = tmp_path / "e" / files.CHECKPOINT, open_checkpoint(root)
    config = json.loads((folder / files.CONFIG).read_text("utf-8"))
    assert config["quantization_config"]["symmetric"] is True
    stored = load_file(folder / "model.safetensors")
    linears = 0
    for index in range(2):
        for name in source.config.llm.layer_linears(index):
            tensors = {part: stored.pop(f"{name}.{part}") for part in AWQ_GEMM.tensors}
            if f"{name}.bias" in stored:
                tensors["bias"] = stored.pop(f"{name}.bias")
            found, expected = AWQ_GEMM.unpack(tensors, 128), source.llm.linear(name)
            assert isinstance(expected, QuantizedLinear)
            assert torch.equal(found.q, expected.q)
            assert torch.equal(found.scale, expected.scale)
            assert found.symmetric
            assert (found.bias is None) == (expected.bias is None)
            linears += 1
    assert linears == 14
    for name, tensor in stored.items():
        assert torch.equal(tensor, source.llm.tensor(name).half())
    assert {p.name for p in (tmp_path / "e" / "vision").iterdir()} == {"model.onnx", "model.data"}


def test_transformers_reads_the_float16_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    root = make_checkpoint(tmp_path / "c", **SIZES, qwen2=True)
    build_engine(root, tmp_path / "e", OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e" / files.CHECKPOINT)
    llm = open_checkpoint(root).llm
    name = "model.layers.1.self_attn.k_proj"
    loaded = model.get_submodule(name)
    assert torch.equal(loaded.weight, llm.tensor(f"{name}.weight").half())
    assert torch.equal(loaded.bias, llm.tensor(f"{name}.bias").half())


def test_the_exporters_step(
    tmp_path: Path, exporter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nowhere")
        manifest = build_engine(quantized(tmp_path), tmp_path / "e", OPTIONS)
        assert [step.id for step in manifest.pending_steps] == ["export"]
        with pytest.raises(VilaDeployError, match=r"export is not here; install it .*0\.11\.0"):
            build_engine(tmp_path / "e", tmp_path / "e", OPTIONS)
    exporter.write_text("model_type is unknown")
    with pytest.raises(VilaDeployError, match=r"export failed \(.*model_type is unknown\); see"):
        build_engine(tmp_path / "e", tmp_path / "e", OPTIONS)
    exporter.unlink()
    manifest = build_engine(tmp_path / "e", tmp_path / "e", OPTIONS)
    assert manifest.pending_steps == ()
    assert load_manifest(tmp_path / "e") == manifest
    names = {path.name for path in (tmp_path / "e").iterdir()}
    assert names == {"EDGE_LLM.md", "exported", "manifest.json", "tokenizer", "vision"}
    with pytest.raises(VilaDeployError, match=r"llm_build and llm_inference on the board, not"):
        open_engine(tmp_path / "e")
    text = (tmp_path / "e" / files.INSTRUCTIONS).read_text("utf-8")
    assert "--maxInputLen 256 --maxKVCacheCapacity 256" in text
    assert "exported/llm" in text


def test_an_exporter_that_writes_too_little_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_exporter(tmp_path, monkeypatch, [files.GRAPH])
    with pytest.raises(VilaDeployError, match=r"without writing llm/embedding\.safetensors"):
        build_engine(quantized(tmp_path), tmp_path / "e", OPTIONS)
    assert load_manifest(tmp_path / "e").pending_steps


ASYMMETRIC: dict[str, Any] = {**SIZES, "quantized": True, "group_size": 128}
REFUSALS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "zero points": (ASYMMETRIC, [], "no zero points: .*--symmetric --group-size 128"),
    "groups of 64": ({**ASYMMETRIC, "group_size": 64}, [], "no zero points"),
    "several GPUs": (SIZES, ["--tp", "2"], "runs on one GPU"),
    "int8 head": (SIZES, ["--lm-head", "int8"], "has --lm-head fp16, not int8"),
    "int8 cache": (SIZES, ["--kv-cache", "int8"], "has --kv-cache fp16, not int8"),
    "int8 tower": (SIZES, ["--vision", "int8"], "has --vision fp16, not int8"),
    "JetPack": (SIZES, ["--jetpack", "7"], "--jetpack is for backend tensorrt"),
    "kernels": (SIZES, ["--kernel-launch", "pdl"], "--kernel-launch is for backend native"),
    "activations": (SIZES, ["--activations", "int8"], "--activations is for backend onnxr"),
    "batch": (SIZES, ["--max-batch-size", "9"], "more than this backend's 8"),
    "accuracy": (SIZES, ["--eval", "builtin"], "nothing to measure"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_it_does_not_take_is_one_line(tmp_path: Path, name: str) -> None:
    sizes, arguments, message = REFUSALS[name]
    root = make_checkpoint(tmp_path / "c", **sizes)
    command = [root, "--target", "orin", "--backend", "edge-llm", "-o", tmp_path / "e", *arguments]
    assert re.search(message, assert_one_line(invoke("vila-build-engine", *command)))
    assert not (tmp_path / "e").exists()


def test_groups_of_another_size_are_refused(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "fp16", **SIZES)
    root = round_checkpoint(root, tmp_path / "int4", ["awq"], QuantScheme(64, symmetric=True))
    with pytest.raises(VilaDeployError, match="have groups of 128, found 64"):
        build_engine(root, tmp_path / "e", OPTIONS)


def test_it_is_for_boards_only(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", **SIZES)
    with pytest.raises(VilaDeployError, match="target rtx4090 has no backend 'edge-llm'"):
        build_engine(root, tmp_path / "e", BuildOptions("rtx4090", "edge-llm"))


def test_the_plan_names_the_heads_block_in_one_piece(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", **{**SIZES, "vocab": 400_000, "hidden": 512})
    plan = plan_build(resolve_build(root, OPTIONS, planning=True))
    (step,) = (step for step in plan.steps if "in one piece" in step.name)
    assert step.memory_bytes == int(1.73 * 400_000 * 512 * 2)
    assert "cma=" in step.name


@pytest.mark.parametrize("name", PROMPT_TEMPLATES)
def test_the_chat_template_renders_what_the_model_was_trained_with(name: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = PROMPT_TEMPLATES[name]
    # As transformers renders them.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    turns = [('first "quoted"\n {{ x }}', " answer é"), ("second", "\nthird\n")]
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "last"})
    found = environment.from_string(jinja_of(template, "<s> ")).render(messages=messages)
    assert found == "<s> " + render(template, turns, "last")


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("vicuna_v1", "<s> "),
        ("hermes-2", " "),
        ("qwen2", ""),
        ("llama_3", "<|begin_of_text|>"),
        ("llama_3, no BOS", ""),
    ],
)
def test_a_prompt_has_the_tokens_of_training(tmp_path: Path, name: str, begins: str) -> None:
    """As the C++ runtime cuts the rendered chat template: without adding BOS or a space."""
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    write_real_tokenizer(source, name)
    template = PROMPT_TEMPLATES[name.partition(",")[0]]
    prefix = write_tokenizer(folder, source, template)
    assert prefix == begins
    expected, found = load_tokenizer(source), JsonTokenizer(folder / files.TOKENIZER)
    for text in PROBES:
        prompt = render(template, [(text, text)], text)
        assert found.encode(prefix + prompt) == expected.bos_ids + expected.encode(prompt)
    parts = json.loads((folder / files.TOKENIZER).read_text("utf-8"))
    if parts["model"]["byte_fallback"]:
        assert parts["pre_tokenizer"] is None
        assert parts["normalizer"] == {
            "type": "Replace", "pattern": {"String": " "}, "content": "\u2581",
        }  # fmt: skip


def test_a_tokenizer_that_would_cut_otherwise_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a model whose pieces are no BPE."""
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    write_real_tokenizer(source, "vicuna_v1")
    monkeypatch.setattr(edge_tokenizer, "_merges", lambda piece, pieces: [])
    with pytest.raises(VilaDeployError, match=r"would give prompts other tokens; use --backend"):
        write_tokenizer(folder, source, PROMPT_TEMPLATES["vicuna_v1"])
