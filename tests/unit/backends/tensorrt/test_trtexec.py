"""Engines of NVIDIA's trtexec: its commands, and what is taken of what it made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import backend as backend_module
from vila_deploy.backends.tensorrt import compile_worker, compilers, cuda, files
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.utils.errors import VilaDeployError

OPTIONS = BuildOptions("orin", max_seq_len=96, max_input_len=64)


def trt(profiles: int, names: list[str]) -> Any:
    """A TensorRT whose engines have these profiles and tensors."""
    engine = SimpleNamespace(
        num_optimization_profiles=profiles,
        num_io_tensors=len(names),
        get_tensor_name=lambda index: names[index],
    )
    return SimpleNamespace(
        __version__="10.3.0",
        ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0}),
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda plan: engine if bytes(plan[:4]) == b"plan" else None
        ),
    )


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine folder on an Orin, whose compiler fails."""
    build_engine(make_checkpoint(tmp_path / "c"), tmp_path / "e", OPTIONS)

    def fails(compiler: Any, job: Any, advance: Any) -> None:
        raise VilaDeployError(f"compiles {job.graph.parent.name}")

    monkeypatch.setattr(backend_module, "host_platform", lambda: "linux-aarch64")
    monkeypatch.setattr(compile_worker, "compile_graph", fails)
    monkeypatch.setattr(cuda, "compute_capability", lambda: "8.7")
    return tmp_path / "e"


def test_its_commands_have_the_shapes_of_every_input(tmp_path: Path) -> None:
    build_engine(make_checkpoint(tmp_path / "c"), tmp_path / "e", OPTIONS)
    text = (tmp_path / "e" / files.TRTEXEC).read_text("utf-8")
    vision, llm = text.split("trtexec \\")[1:]
    assert "--onnx=vision/model.onnx" in vision
    assert "--optShapes=pixels:1x3x42x42" in vision
    assert "--profile" not in vision
    assert "--saveEngine=llm.plan" in llm
    assert "--stronglyTyped" in llm
    graph = onnx.load(tmp_path / "e" / "llm" / files.GRAPH, load_external_data=False).graph
    first, second = llm.split("--profile=")[1:]
    for profile, tokens in ((first, 1), (second, 64)):
        for kind, count in (("min", 1), ("opt", tokens), ("max", tokens)):
            (shapes,) = re.findall(rf"--{kind}Shapes=(\S+)", profile)
            sizes = dict(each.split(":") for each in shapes.strip("'").split(","))
            assert sizes.keys() == {value.name for value in graph.input}
            assert sizes["inputs_embeds"] == f"1x{count}x128"
            assert sizes["past_key_1"] == "1x4x96x32"


def test_its_engines_are_taken_and_the_others_compiled(
    board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["pixels", "features"]
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: trt(1, names))
    (board / "vision.plan").write_bytes(b"plan of trtexec")
    with pytest.raises(VilaDeployError, match="compiles llm"):
        build_engine(board, board, OPTIONS)
    assert (board / "vision" / files.PLAN).read_bytes() == b"plan of trtexec"
    assert not (board / "vision.plan").exists()
    (step,) = load_manifest(board).pending_steps
    assert step.id == "llm"
    profiles = json.loads((board / files.DESCRIPTION).read_text("utf-8"))["profiles"]["llm"]
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: trt(2, [*profiles[0], "logits"]))
    (board / "llm.plan").write_bytes(b"plan of the LLM")
    assert build_engine(board, board, OPTIONS).pending_steps == ()
    assert not (board / files.TRTEXEC).exists()
    assert load_manifest(board).versions["tensorrt"] == "10.3.0"


@pytest.mark.parametrize(
    ("content", "profiles", "names", "message"),
    [
        (b"torn", 1, ["pixels"], "can't load it"),
        (b"plan", 2, ["pixels"], "has 2 profiles and 1 tensors, vision needs 1 and pixels"),
        (b"plan", 1, ["input"], "make it as trtexec.sh says, or remove it"),
    ],
)
def test_another_engine_is_one_line_and_stays(
    board: Path,
    content: bytes,
    profiles: int,
    names: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: trt(profiles, names))
    (board / "vision.plan").write_bytes(content)
    with pytest.raises(VilaDeployError, match=message):
        build_engine(board, board, OPTIONS)
    assert (board / "vision.plan").exists()
    assert not (board / "vision" / files.PLAN).exists()
