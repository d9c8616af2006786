"""Engines of backend tensorrt: compiled here by tensorrt-rtx, finished on a board, refused."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from tests.support.old_engines import old_engine
from tests.support.tensorrt_cases import needs_rtx
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import backend as backend_module
from vila_deploy.backends.tensorrt import compile_worker, compilers, cuda, files
from vila_deploy.backends.tensorrt.backend import BACKEND
from vila_deploy.backends.tensorrt.compile import Job, compile_graph
from vila_deploy.backends.tensorrt.compile_worker import CompileWorker
from vila_deploy.backends.tensorrt.compilers import COMPILERS
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.plan import plan_build
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.cli.build_engine import main
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits, PendingStep, load_manifest
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.target import get_target
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError


@needs_rtx
def test_ahead_of_time_without_a_gpu(tmp_path: Path) -> None:
    """Real engines: nothing of the graphs is left, and what opening lacks here is the GPU."""
    root = make_checkpoint(tmp_path / "c", quantized=True, layers=1, vision_layers=2)
    options = BuildOptions("rtx4090", max_seq_len=64)
    manifest = build_engine(root, tmp_path / "engine", options)
    version = COMPILERS["tensorrt-rtx"].load().__version__
    assert manifest.pending_steps == ()
    assert manifest.versions["tensorrt-rtx"] == version
    assert manifest.versions[files.CAPABILITY] == "8.9"
    assert load_manifest(tmp_path / "engine") == manifest
    kept = {p.relative_to(tmp_path / "engine").as_posix() for p in tmp_path.glob("engine/*/*")}
    assert kept >= {"vision/model.plan", "llm/model.plan"}
    assert not any(name.endswith((".onnx", ".data")) for name in kept)
    try:
        cuda.compute_capability()
    except VilaDeployError:
        with (
            pytest.raises(VilaDeployError, match=r"CUDA|cuda-bindings"),
            open_engine(tmp_path / "engine"),
        ):
            pass


@needs_rtx
def test_parts_that_memory_is_too_small_for_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, layers=1, vision_layers=2)
    engine = tmp_path / "engine"
    command = [str(root), "--target", "a100", "--backend", "tensorrt", "-o", str(engine)]
    command += ["--max-seq-len", "64"]
    with monkeypatch.context() as small:
        small.setattr(backend_module, "available_memory_bytes", lambda: 1 << 28)
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        last = done.stdout.splitlines()[-1]
        assert last.startswith("Left for a computer with more memory: compile vision/model.onnx")
        finish = last.partition("run: vila-build-engine engine ")[2].split()
        finish = [str(engine), *finish[:-1], str(engine)]
        failed = CliRunner().invoke(main, finish)
        assert "compiling takes about 0.4 GB of memory, 0.3 GB are available" in failed.output
        with pytest.raises(VilaDeployError, match="run on a computer with more memory"):
            open_engine(engine).__enter__()
    assert CliRunner().invoke(main, finish).exit_code == 0
    manifest = load_manifest(engine)
    assert (manifest.pending_steps, manifest.versions[files.CAPABILITY]) == ((), "8.0")
    assert sorted(p.name for p in engine.glob("*/model.*")) == ["model.plan", "model.plan"]


@needs_rtx
def test_a_graph_that_the_compiler_refuses_gives_its_first_words(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    job = Job(tmp_path / "model.onnx", tmp_path / "model.plan", (), "8.9")
    with pytest.raises(VilaDeployError, match=r"model\.onnx: tensorrt-rtx \S+ can't compile it \("):
        compile_graph(COMPILERS["tensorrt-rtx"], job, lambda text="", steps=1: None)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An Orin with JetPack 6, whose compiler writes the parts that it has compiled."""
    compiled: list[str] = []

    def compile_part(compiler: Any, job: Job, advance: Any) -> None:
        assert (compiler.package, job.capability) == ("tensorrt", None)
        assert len(job.profiles) == (2 if job.graph.parent.name == "llm" else 1)
        job.plan.write_text("engine")
        job.timing_cache.write_text("times")
        compiled.append(job.graph.parent.name)

    monkeypatch.setattr(backend_module, "host_platform", lambda: "linux-aarch64")
    monkeypatch.setattr(compile_worker, "compile_graph", compile_part)
    monkeypatch.setattr(cuda, "compute_capability", lambda: "8.7")
    trt = SimpleNamespace(__version__="10.3.0")
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: trt)
    return compiled


def test_the_same_command_finishes_on_the_board(
    tmp_path: Path, board: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, engine = make_checkpoint(tmp_path / "c", quantized=True), tmp_path / "engine"
    with monkeypatch.context() as pc:
        pc.setattr(backend_module, "host_platform", lambda: "linux-x86_64")
        done = CliRunner().invoke(main, [str(root), "--target", "orin-nano", "-o", str(engine)])
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    assert "vila-build-engine engine --target orin-nano" in last
    assert not list(engine.rglob("*.plan"))
    # A kill in the middle of the LLM: the plan is there, the manifest does not list it.
    finish_step = BACKEND.finish_step

    def killed(folder: Path, manifest: Any, step: PendingStep) -> Mapping[str, str]:
        if step.id == "llm":
            (folder / "llm" / files.PLAN).write_text("half")
            raise KeyboardInterrupt
        return finish_step(folder, manifest, step)

    with monkeypatch.context() as cut:
        cut.setattr(BACKEND, "finish_step", killed)
        done = CliRunner().invoke(main, [str(engine), "--target", "orin-nano"])
        assert done.exit_code == 130
        kept = f"finished steps are kept in {engine}; the same command goes on"
        assert done.stderr.splitlines()[-1] == f"interrupted: {kept}"
    assert board == ["vision"]
    done = CliRunner().invoke(main, [str(engine), "--target", "orin-nano", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["needs"] == []
    assert board == ["vision", "llm"]
    again = CliRunner().invoke(main, [str(engine), "--target", "orin-nano"])
    assert again.exit_code == 1
    assert "nothing is left to do for this engine; run it with vila-chat" in again.stderr
    manifest = load_manifest(engine)
    assert manifest.versions["tensorrt"] == "10.3.0"
    left = sorted(p.relative_to(engine).as_posix() for p in engine.glob("*/model.*"))
    assert left == ["llm/model.plan", "vision/model.plan"]
    assert (engine / files.TIMING_CACHE).exists()


def test_an_engine_begun_by_an_older_version_is_finished(tmp_path: Path, board: list[str]) -> None:
    engine = old_engine(tmp_path / "engine", "tiny-orin-int4")
    with pytest.raises(VilaDeployError, match=r"is not finished: compile vision/model\.onnx"):
        open_engine(engine).__enter__()
    # A step that was killed: its artifact lies there, the manifest does not list it.
    (engine / "llm" / files.PLAN).write_text("half")
    done = CliRunner().invoke(main, [str(engine), "--target", "orin"])
    assert done.exit_code == 0, done.output
    assert board == ["vision", "llm"]
    assert load_manifest(engine).pending_steps == ()
    left = sorted(path.relative_to(engine).as_posix() for path in engine.glob("*/model.*"))
    assert left == ["llm/model.plan", "vision/model.plan"]


def test_finishing_elsewhere_is_refused(tmp_path: Path, board: list[str]) -> None:
    root = make_checkpoint(tmp_path / "c")
    with pytest.MonkeyPatch.context() as other:
        other.setattr(cuda, "compute_capability", lambda: "7.2")
        build_engine(root, tmp_path / "engine", BuildOptions("orin"))
        with pytest.raises(VilaDeployError, match=r"8\.7 \(NVIDIA Jetson AGX .*this GPU has 7\.2"):
            build_engine(root, tmp_path / "engine", BuildOptions("orin"))
    with pytest.raises(VilaDeployError, match=r"was begun with --target orin, not orin-nano"):
        build_engine(root, tmp_path / "engine", BuildOptions("orin-nano"))


def test_jetpack_chooses_the_dialect_and_what_can_read_it(tmp_path: Path, board: list[str]) -> None:
    root = make_checkpoint(tmp_path / "c")
    with pytest.raises(VilaDeployError, match=r"10\.3\.0 is older than 10\.15, .*dialect standard"):
        build_engine(root, tmp_path / "engine", BuildOptions("orin", jetpack="7"))
    described = json.loads((tmp_path / "engine" / files.DESCRIPTION).read_text("utf-8"))
    assert described["dialect"] == "standard"
    graph = onnx.load(tmp_path / "engine" / "llm" / files.GRAPH, load_external_data=False).graph
    attention = [node for node in graph.node if node.op_type == "Attention"]
    assert attention
    assert all("TRT_decomposable" in {each.name for each in node.attribute} for node in attention)


def test_groups_that_the_devices_compiler_lacks_are_refused_before_quantizing(
    tmp_path: Path,
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, group_size=32)
    plan_build(resolve_build(root, BuildOptions("rtx4090"), planning=True))
    with pytest.raises(VilaDeployError, match="group size 32 is not one of 64, 128, which"):
        plan_build(resolve_build(root, BuildOptions("orin"), planning=True))


def test_an_interrupt_before_there_is_an_engine_says_that_nothing_is_left(
    tmp_path: Path, board: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BACKEND, "build", cut)
    root = make_checkpoint(tmp_path / "c")
    done = CliRunner().invoke(main, [str(root), "--target", "orin", "-o", str(tmp_path / "e")])
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "interrupted: nothing was left behind"
    assert not (tmp_path / "e").exists()


REFUSALS = {
    "FP8 on Orin": (BuildOptions("orin", precision="fp8"), r"8\.7\) has no FP8; quantize to 4"),
    "SM90 with RTX": (
        BuildOptions("h100", backend="tensorrt-rtx"),
        r"not for 9\.0 of NVIDIA H100 SXM 80 GB; use --backend native",
    ),
    "Orin with RTX": (BuildOptions("orin", backend="tensorrt-rtx"), r"not for 8\.7 .*; use --back"),
    "several GPUs": (BuildOptions("a100", tp=2), r"one GPU, .*; leave them out, or use --backend"),
    "JetPack of a PC": (BuildOptions("rtx4090", jetpack="6"), r"is for Jetson, .*; leave it out"),
    "another card": (
        BuildOptions("rtx3090"),
        r"unknown target 'rtx3090'; choose from a100, .*, vulkan; for another GPU copy the file",
    ),
    "FP8 on a CPU": (BuildOptions("cpu", precision="fp8"), r"processor has no FP8; quantize to 4"),
    "JetPack of another backend": (
        BuildOptions("orin", backend="native", jetpack="6"),
        r"is for backend tensorrt, not for native; leave it out",
    ),
    "int8 tower on Orin": (
        BuildOptions("orin", module_precision=ModulePrecision(vision="int8")),
        r"use --backend native or llamacpp, or leave --vision out",
    ),
    "unknown JetPack": (BuildOptions("orin", jetpack="4"), r"unknown .*; choose from 6, 7"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_built_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    root = make_checkpoint(tmp_path / "c")
    options, message = REFUSALS[name]
    with pytest.raises(VilaDeployError, match=message):
        plan_build(resolve_build(root, options, planning=True))
    with pytest.raises(VilaDeployError, match=message):
        build_engine(root, tmp_path / "engine", options)
    assert not (tmp_path / "engine").exists()


def test_what_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from vila_deploy.engine import target

    small = replace(target.get_target("orin-nano"), memory_bytes=2 << 30)
    monkeypatch.setattr("vila_deploy.builder.resolve.get_target", lambda name: small)
    root = make_checkpoint(tmp_path / "c", max_length=1 << 20, kv_heads=4)
    options = BuildOptions("orin-nano", max_seq_len=1 << 20)
    with pytest.raises(
        VilaDeployError, match=r"has 1\.1 GB for it; what would do: .*--max-seq-len"
    ):
        build_engine(root, tmp_path / "engine", options)


@needs_rtx
def test_a_part_compiled_aside_says_what_was_wrong_with_it(tmp_path: Path) -> None:
    config = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True)).config
    engine = tmp_path / "engine"
    (engine / "vision").mkdir(parents=True)
    limits = Limits(max_batch_size=1, max_input_len=32, max_seq_len=64)
    backend_module.write_description(engine, config, BuildRequest(get_target("rtx4090"), limits))
    (engine / "vision" / files.GRAPH).write_bytes(b"no graph")
    with (
        CompileWorker(engine, "vision") as compiling,
        pytest.raises(VilaDeployError, match=r"model\.onnx: tensorrt-rtx \S+ can't compile it \("),
    ):
        compiling.versions()
    with CompileWorker(engine, "vision") as compiling:
        compiling.process.kill()
        with pytest.raises(VilaDeployError, match=r"vision ended before its time \(signal 9\)"):
            compiling.versions()
    with pytest.raises(KeyboardInterrupt), CompileWorker(engine, "vision") as compiling:
        raise KeyboardInterrupt
    assert compiling.process.returncode == -signal.SIGKILL


def test_a_full_disk_aside_is_a_full_disk_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_part(folder: Path, part: str, advance: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / part))

    monkeypatch.setattr(compile_worker, "compile_module", compile_part)
    monkeypatch.setattr("sys.argv", ["aside", "engine", "vision"])
    with pytest.raises(SystemExit):
        compile_worker.main()
    with pytest.raises(OSError, match="No space left on device: 'engine/vision'"):
        compile_worker.parse_answer(capsys.readouterr().out)
