"""Building for TensorRT-LLM up to the device's steps, and those with a stand-in for its tools."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.support.paths import REPOSITORY
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.registry import get_backend
from vila_deploy.backends.tensorrt_llm import build as backend
from vila_deploy.backends.tensorrt_llm import device
from vila_deploy.backends.tensorrt_llm.releases import DESKTOP, JETSON, build_command, check_version
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.builder.plan import plan_build, plan_targets
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.checkpoint.trtllm_reader import TrtllmCheckpoint
from vila_deploy.cli.build_engine import main
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits, load_manifest
from vila_deploy.engine.target import get_target
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError

# Stands for trtllm-build: checks its input, writes what the real one would.
BUILDER = """#!{python}
import pathlib, sys
flags = dict(a.removeprefix("--").split("=") for a in sys.argv[1:] if "=" in a)
source, out = pathlib.Path(flags["checkpoint_dir"]), pathlib.Path(flags["output_dir"])
print("[TRT-LLM] [I] Building")
fail = pathlib.Path(r"{fail}")
if fail.exists():
    print("[11/23/2026-05:00:00] [TRT-LLM] [E] " + fail.read_text())
    print("[TRT-LLM] [I] leaving")
    sys.exit(3)
assert (source / "config.json").is_file()
out.mkdir()
for rank in source.glob("rank*.safetensors"):
    (out / rank.name.replace("safetensors", "engine")).write_text("engine")
(out / "config.json").write_text('{{"pretrained_config": {{"mapping": {{"world_size": 1}}}}}}')
with open(r"{log}", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("c") / "vila", kv_heads=2)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A device: a trtllm-build, a fitting GPU and a TensorRT that compiles anything."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "trtllm-build"
    text = BUILDER.format(python=sys.executable, fail=tmp_path / "fail", log=tmp_path / "calls")
    script.write_text(text)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(backend, "check_capability", lambda expected, title: None)
    compiled = []

    def compile_vision(folder, engine, size):
        compiled.append(size)
        (folder / "vision" / engine).write_text("engine")
        return "10.14.1"

    monkeypatch.setattr(backend, "compile_vision", compile_vision)
    return compiled


def build(checkpoint: Path, out: Path, target: str = "a100", tp: int = 1, pp: int = 1):
    options = BuildOptions(target, "tensorrt-llm", max_seq_len=256, max_input_len=128, tp=tp, pp=pp)
    return build_engine(checkpoint, out, options)


def test_host_writes_everything_but_the_engines(checkpoint, tmp_path):
    manifest = build(checkpoint, tmp_path / "e", "orin")
    assert manifest.pending_steps == (backend.VISION_STEP, backend.LLM_STEP)
    assert load_manifest(tmp_path / "e").pending_steps == manifest.pending_steps
    names = {p.relative_to(tmp_path / "e").as_posix() for p in (tmp_path / "e").rglob("*.*")}
    assert {
        "BUILD.md", "embedding.npy", "vision/visual_encoder.onnx", "vision/config.json",
        "llm_checkpoint/config.json", "llm_checkpoint/rank0.safetensors",
    } <= names  # fmt: skip
    assert not list((tmp_path / "e").rglob("*.engine"))
    text = (tmp_path / "e" / "BUILD.md").read_text()
    assert "v0.12.0-jetson" in text
    assert "--checkpoint_dir=llm_checkpoint" in text
    assert "--saveEngine=vision/visual_encoder.engine" in text
    with pytest.raises(VilaDeployError, match=r"is not finished.*; run on the device: vila"), \
            open_engine(tmp_path / "e"):  # fmt: skip
        pass


def test_checkpoint_and_picture_graph_are_the_models(checkpoint, tmp_path):
    build(checkpoint, tmp_path / "e")
    source = open_checkpoint(checkpoint)
    back = TrtllmCheckpoint(tmp_path / "e" / "llm_checkpoint", source.config.llm)
    for name in ("self_attn.k_proj", "mlp.gate_proj"):
        full = f"model.layers.1.{name}"
        assert back.linear(full).equal(source.llm.linear(full).half())
    graph = tmp_path / "e" / "vision" / "visual_encoder.onnx"
    model = onnx.load(graph, load_external_data=False)
    (pixels,), (features,) = model.graph.input, model.graph.output
    assert (pixels.name, features.name) == ("input", "encoder_output")
    half = onnx.TensorProto.FLOAT16
    assert [v.type.tensor_type.elem_type for v in (pixels, features)] == [half, half]
    assert {o.domain: o.version for o in model.opset_import}[""] <= 21
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((3, 3, 42, 42)).astype(np.float16)
    (found,) = session.run(None, {"input": images})
    expected = ReferenceSession(source).encode_images(images.astype(np.float32))
    assert found.dtype == np.float16
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 5e-3
    config = json.loads((graph.parent / "config.json").read_text())["builder_config"]
    assert config["model_type"] == "vila"
    assert config["precision"] == "float16"
    assert config["output_shape"] == [-1, *expected.shape[1:]]


@pytest.mark.parametrize("release", [JETSON, DESKTOP])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_commands_are_what_each_release_takes(release, precision):
    request = BuildRequest(get_target("a100"), Limits(2, 1000, 1200), tp=2)
    command = build_command(release, request, precision, Path("x"))
    assert command[0] == "trtllm-build"
    for flag in (
        "--checkpoint_dir=x/llm_checkpoint", "--output_dir=x/llm", "--max_batch_size=2",
        "--max_input_len=1000", "--max_seq_len=1200", "--max_multimodal_len=2000",
        "--max_num_tokens=2000", "--workers=2",
    ):  # fmt: skip
        assert flag in command
    # What the session relies on: logits in streams of several GPUs, reuse of the cache.
    assert "--gather_generation_logits" in command
    assert ("--use_paged_context_fmha=enable" in command) == (release is DESKTOP)
    fused = [flag for flag in command if "fused" in flag]
    switch, enable = release is JETSON, precision == "fp16"
    if switch:
        assert fused == (["--use_fused_mlp"] if enable else [])
    else:
        assert fused == [f"--use_fused_mlp={'enable' if enable else 'disable'}"]


def test_plan_is_for_each_of_the_gpus(checkpoint):
    plans = {}
    for tp in (1, 2):
        options = BuildOptions("a100", "tensorrt-llm", max_seq_len=256, tp=tp)
        resolved = resolve_build(checkpoint, options, planning=True)
        plans[tp] = plan_build(resolved)
    sizes = {
        tp: {part.name: part.bytes for part in plan.items.values()} for tp, plan in plans.items()
    }
    halved = {name for name in sizes[1] if sizes[2][name] == sizes[1][name] // 2}
    assert halved == {
        "llm decoder linears", "llm embeddings", "llm head", "key/value cache of 256 tokens",
    }  # fmt: skip
    saved = sum(sizes[1].values()) - sum(sizes[2].values())
    assert plans[1].device_bytes - plans[2].device_bytes == saved
    assert plans[2].steps[-1].name.endswith("each of 2")
    of_one_gpu = {fit.target for fit in plan_targets(resolved)}
    assert "a100" not in of_one_gpu
    assert "rtx4090" in of_one_gpu
    options = BuildOptions("a100", "tensorrt-llm", max_seq_len=256, pp=2)
    staged = plan_build(resolve_build(checkpoint, options, planning=True))
    shared = {part.name for part in staged.items.values() if part.bytes == sizes[1][part.name] // 2}
    assert shared == {"llm decoder linears", "key/value cache of 256 tokens"}


def test_versions_that_fit():
    for release, version in ((JETSON, "0.12.0"), (DESKTOP, "0.16.0"), (DESKTOP, "1.2.1")):
        check_version(release, version)
    for release, version in ((JETSON, "1.2.1"), (DESKTOP, "0.15.0"), (DESKTOP, "1.3.0rc22")):
        with pytest.raises(VilaDeployError, match=f"TensorRT-LLM {version} is here, this engine"):
            check_version(release, version)


def test_the_device_finishes_and_repeats_nothing(checkpoint, tmp_path, board, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", "/nowhere")
        assert build(checkpoint, tmp_path / "e").pending_steps
    (tmp_path / "fail").write_text("Required but not provided tensors")
    gone = tmp_path / "not-here"  # the board has the folder only
    with pytest.raises(VilaDeployError) as caught:
        build(gone, tmp_path / "e")
    line = r"trtllm-build failed \(Required but not provided tensors\); see \S+\.log, then run"
    assert re.match(line, str(caught.value))
    assert load_manifest(tmp_path / "e").pending_steps == (backend.LLM_STEP,)
    assert not list(tmp_path.glob("e/vision/*.onnx"))
    assert (tmp_path / "e" / "llm_checkpoint" / "rank0.safetensors").exists()
    # What a kill leaves: files that the manifest does not list yet.
    (tmp_path / "e" / "llm.partial").mkdir()
    (tmp_path / "e" / "llm.partial" / "rank0.engine").write_text("half")
    (tmp_path / "fail").unlink()
    manifest = build(gone, tmp_path / "e")
    assert manifest.pending_steps == ()
    assert manifest.versions["tensorrt"] == "10.14.1"
    assert board == [42]
    assert load_manifest(tmp_path / "e") == manifest
    assert (tmp_path / "e" / "llm" / "rank0.engine").read_text() == "engine"
    # What the engines were made from is as large as they are.
    assert {path.name for path in (tmp_path / "e").iterdir()} == {
        "embedding.npy", "llm", "manifest.json", "tokenizer", "vision",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "e" / "vision").iterdir()} == {
        "config.json", DESKTOP.vision_engine,
    }  # fmt: skip
    assert "--max_input_len=128" in (tmp_path / "calls").read_text()
    with pytest.raises(VilaDeployError, match="output folder exists"):
        build(checkpoint, tmp_path / "e")


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}])
def test_on_the_device_one_command_does_all(checkpoint, tmp_path, board, parallel):
    manifest = build(checkpoint, tmp_path / "e", **parallel)
    assert manifest.pending_steps == ()
    assert sorted(p.name for p in (tmp_path / "e" / "llm").glob("*.engine")) == [
        "rank0.engine",
        "rank1.engine",
    ]
    assert "--workers=2" in (tmp_path / "calls").read_text()


def test_stages_hold_their_own_layers(checkpoint, tmp_path):
    build(checkpoint, tmp_path / "e", pp=2)
    ranks = [
        load_file(tmp_path / "e" / f"llm_checkpoint/rank{rank}.safetensors") for rank in (0, 1)
    ]
    layers = [{int(n.split(".")[2]) for n in rank if ".layers." in n} for rank in ranks]
    assert len(layers[0]) == len(layers[1])
    assert "transformer.vocab_embedding.weight" in ranks[0]
    assert "lm_head.weight" in ranks[1]
    assert "2 stages of layers, each on one GPU" in (tmp_path / "e" / "BUILD.md").read_text()


def test_a_folder_is_finished_as_what_it_was_begun(checkpoint, tmp_path):
    build(checkpoint, tmp_path / "e")
    with pytest.raises(VilaDeployError, match=r"was begun with --target a100, not orin; give"):
        build(checkpoint, tmp_path / "e", "orin")
    with pytest.raises(VilaDeployError, match=r"trtllm-build is not here; install TensorRT-LLM 0"):
        build(checkpoint, tmp_path / "e")


def test_killed_for_memory_says_so(tmp_path):
    script = tmp_path / "trtllm-build"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    with pytest.raises(VilaDeployError, match="was killed, as Linux does when memory runs out; cl"):
        device.run_builder([str(script)])
    script.write_text("#!/bin/sh\necho '[E] Error Code 2: OutOfMemory (x)'\nexit 1\n")
    with pytest.raises(VilaDeployError, match=r"failed \(Error Code 2: OutOfMemory .* add swap"):
        device.run_builder([str(script)])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"qwen2": True}, {}, "never had engines for NVILA (Qwen2); use --backend tensorrt or"),
        (
            {"quantized": True},
            {},
            "llm/config.json: quantization_config.zero_point: is quantized with zero points, "
            "TensorRT-LLM's W4A16_AWQ has none; quantize with vila-quantize --symmetric",
        ),
        ({}, {"tp": 3}, "3 GPUs can't share 4 attention heads evenly; choose a --tp that divides"),
        (
            {},
            {"backend": "onnxruntime", "target": "cpu", "tp": 2},
            "--tp and --pp are for several GPUs",
        ),
        (
            {
                "image": 28,
                "scales": 2,
                "root_config": {"s2": True, "s2_scales": "28,56", "s2_max_split_size": 28},
                "preprocessor_config": {"size": {"height": 56, "width": 56}},
            },
            {},
            "vision engines take one image size, this model tiles them (s2); use --backend",
        ),
    ],
)
def test_refuses_in_one_line(tmp_path, changes, options, message):
    root = make_checkpoint(tmp_path / "c", **changes)
    asked = {"target": "a100", "backend": "tensorrt-llm", "tp": 1, **options}
    command = [str(root), "-o", str(tmp_path / "e")]
    for option, value in asked.items():
        command += [f"--{option}", str(value)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert message in line
    assert not (tmp_path / "e").exists()


def test_last_line_says_what_to_run_on_the_board(checkpoint, tmp_path):
    command = [str(checkpoint), "--target", "orin", "--backend", "tensorrt-llm"]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "e")])
    assert result.exit_code == 0
    last = result.output.strip().splitlines()[-1]
    assert "vila-build-engine e --target orin --backend tensorrt-llm -o e" in last


def test_every_command_of_the_guide_fits_by_its_own_plan():
    """Each `--target … --tp N` of docs/tensorrt-llm.md with the model of its sentence."""
    text = (REPOSITORY / "docs" / "tensorrt-llm.md").read_text("utf-8")
    found = re.findall(r"(VILA1\.5-40b) in float16[^|#]*?`--target (\w+) --tp (\d)`", text, re.S)
    assert found
    for model, target, tp in found:
        request = BuildRequest(get_target(target), Limits(1, 4096, 4096), tp=int(tp))
        planned = plan_engine(preset(model, "fp16"), get_backend("tensorrt-llm"), "fp16", request)
        assert planned.fits, (planned.device_bytes, planned.limit_bytes)
