"""What compiling asks of a board: memory in one piece; and what an engine's size says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.plans import plan_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import backend as backend_module
from vila_deploy.backends.tensorrt import compile_worker, compilers, cuda, files
from vila_deploy.backends.tensorrt.compile_worker import growth_warning
from vila_deploy.backends.tensorrt.memory import LLM_GRAPH
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions, resolve_backend
from vila_deploy.checkpoint.presets import PRESETS, preset
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.target import get_target, load_targets
from vila_deploy.utils import estimates

ORINS = [name for name in load_targets() if name.startswith("orin")]
DEFAULT_CMA = 256 << 20


def contiguous_step(model: str, precision: str, target: Any) -> Any:
    config, limits = preset(model, precision), Limits(1, 1024, 1024)
    plan = plan_engine(config, target, "tensorrt", precision, limits)
    return next((step for step in plan.steps if "in one piece" in step.name), None)


@pytest.mark.parametrize("precision", ["int4", "fp16"])
@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("target", ORINS)
def test_every_board_gives_what_its_plan_asks_for_in_one_piece(
    target: str, model: str, precision: str
) -> None:
    step = contiguous_step(model, precision, get_target(target))
    assert 0 < step.memory_bytes < DEFAULT_CMA
    assert "the board gives 0.27 GB" in step.name
    assert "cma=" not in step.name


def test_only_boards_have_such_a_limit() -> None:
    assert contiguous_step("VILA1.5-3b", "int4", get_target("rtx4090")) is None


def test_a_plan_that_asks_for_more_says_what_to_do() -> None:
    target = get_target("orin-nano")
    assert target.tensorrt is not None
    small = replace(target, tensorrt=replace(target.tensorrt, contiguous_bytes=1 << 20))
    step = contiguous_step("VILA1.5-3b", "int4", small)
    assert "for llm head; the board gives 0.00 GB: start the kernel with a larger cma=" in step.name
    assert step.name.endswith("or take --lm-head int8")


def test_matrices_of_the_graph_are_those_of_the_plan(tmp_path: Path) -> None:
    """A head in pieces, for a board; in one, for a GPU with memory of its own."""
    root = make_checkpoint(tmp_path / "c", vocab=100_003, hidden=512, heads=8, layers=1)
    graph_bytes = {}
    for target in ("orin-nano", "h100"):
        options = BuildOptions(target, "tensorrt", max_seq_len=64)
        build_engine(root, tmp_path / target, options)
        import onnx

        graph = onnx.load(tmp_path / target / "llm" / files.GRAPH, load_external_data=False).graph
        sizes = [t.dims[0] * t.dims[1] * 2 for t in graph.initializer if len(t.dims) == 2]
        graph_bytes[target] = max(sizes)
    assert graph_bytes["h100"] == 100_003 * 512 * 2
    described = json.loads((tmp_path / "orin-nano" / files.DESCRIPTION).read_text("utf-8"))
    assert described["contiguous_bytes"] == int(1.73 * graph_bytes["orin-nano"])
    assert graph_bytes["orin-nano"] <= 96_000_000
    described = json.loads((tmp_path / "h100" / files.DESCRIPTION).read_text("utf-8"))
    assert "contiguous_bytes" not in described


@pytest.mark.parametrize(("kept_kb", "free_kb"), [(1, 7_000_000), (262_144, 300_000)])
def test_a_board_with_too_little_memory_says_so(
    tmp_path: Path,
    kept_kb: int,
    free_kb: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = make_checkpoint(tmp_path / "c")
    manifest = build_engine(root, tmp_path / "e", BuildOptions("orin", max_seq_len=64))
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        f"MemTotal: 8000000 kB\nMemAvailable: {free_kb} kB\nSwapFree: 1000 kB\n"
        f"CmaTotal: {kept_kb} kB\nCmaFree: 0 kB\n"
    )
    monkeypatch.setattr(estimates, "MEMINFO", meminfo)
    monkeypatch.setattr(backend_module, "host_platform", lambda: "linux-aarch64")
    monkeypatch.setattr(cuda, "compute_capability", lambda: "8.7")
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: None)
    capsys.readouterr()
    backend_module.BACKEND.check_device(tmp_path / "e", manifest)
    said = capsys.readouterr().err
    assert ("in one piece" in said) == (kept_kb == 1)
    assert ("cma= (docs/orin.md)" in said) == (kept_kb == 1)
    assert ("compiling is assumed to take 0.4 GB of memory, 0.3 GB are" in said) == (kept_kb != 1)


@pytest.mark.parametrize("target", ORINS)
def test_what_compiling_on_a_board_takes_is_called_assumed(target: str) -> None:
    """At least what its parser copies, and the builder's and the engine's own weights."""
    for model in ("VILA1.5-3b", "NVILA-8B"):
        request = BuildRequest(get_target(target), Limits(1, 256, 256))
        estimate = backend_module.BACKEND.estimate_memory(
            preset(model, "int4"), request, "int4", 8 << 30
        )
        step = estimate.build_steps[0]
        assert "assumed" in step.name
        assert step.memory_bytes > 3 * sum(estimate.items[row].bytes for row in LLM_GRAPH)


def test_an_engine_that_has_grown_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True)
    build_engine(root, tmp_path / "e", BuildOptions("orin", max_seq_len=64))
    monkeypatch.setattr(compile_worker, "KERNEL_BYTES", 0)
    monkeypatch.setattr(compilers.Compiler, "check_dialect", lambda self, dialect: "10.3.0")
    weights = (tmp_path / "e" / "llm" / files.WEIGHTS).stat().st_size
    for factor, grown in ((1.1, False), (3.0, True)):
        size = int(factor * weights)
        monkeypatch.setattr(
            compile_worker,
            "compile_graph",
            lambda compiler, job, advance, size=size: job.plan.write_bytes(bytes(size)),
        )
        capsys.readouterr()
        compile_worker.compile_module(tmp_path / "e", "llm", lambda text="", steps=1: None)
        assert ("TensorRT holds them in more bits" in capsys.readouterr().err) == grown


def test_kernels_of_a_small_engine_are_no_growth() -> None:
    assert growth_warning(40 << 20, 1 << 20) == ""
    assert growth_warning(int(1.13 * 5e9), int(5e9)) == ""
    assert "5.00 GB for 1.50 GB of weights" in growth_warning(int(5e9), int(1.5e9))


def test_the_default_of_each_target_is_supported_there() -> None:
    """NVIDIA's tables of tensorrt-rtx list no compute capability 8.0."""
    notes = {}
    for target in load_targets().values():
        request = BuildRequest(target, Limits(1, 64, 64))
        default = resolve_backend(target, None)
        assert default.notes(request) == ()
        if "tensorrt" in target.backends:
            notes[target.name] = resolve_backend(target, "tensorrt").notes(request)
    assert [name for name, note in notes.items() if note] == ["a100"]
    (note,) = notes["a100"]
    assert note.endswith("do not list compute capability 8.0; supported there: --backend "
                         "tensorrt-llm or native or llamacpp")  # fmt: skip
