"""Compiling a graph with a stand-in of TensorRT: what is asked, said, too old."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vila_deploy.backends.tensorrt import compilers
from vila_deploy.backends.tensorrt.compile import Job, compile_graph
from vila_deploy.backends.tensorrt.compilers import COMPILERS
from vila_deploy.backends.tensorrt.log import ErrorLog
from vila_deploy.utils.errors import VilaDeployError


def device_compiler(calls: dict[str, Any], build: Any = lambda network, config: b"plan") -> Any:
    """The calls that tensorrt 10.3 has and tensorrt-rtx has not, on a stand-in of it."""
    cache = SimpleNamespace(serialize=lambda: b"new times")

    def create_timing_cache(known: bytes) -> Any:
        calls.setdefault("known", []).append(known)
        return None if known == b"torn" else cache

    def set_timing_cache(used: Any, ignore_mismatch: bool) -> bool:
        calls.update(used=used is cache)
        return calls["known"] != [b"another GPU"]

    config = SimpleNamespace(
        add_optimization_profile=lambda profile: 0,
        create_timing_cache=create_timing_cache,
        set_timing_cache=set_timing_cache,
        get_timing_cache=lambda: cache,
    )
    builder = SimpleNamespace(
        create_network=lambda flags: calls.update(flags=flags),
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: SimpleNamespace(
            set_shape=lambda *shape: calls.update(shape=shape)
        ),
        build_serialized_network=build,
    )
    trt = SimpleNamespace(
        __version__="10.3.0",
        ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0}),
        IProgressMonitor=object,
        Builder=lambda logger: builder,
        OnnxParser=lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        ComputeCapability=SimpleNamespace(SM89=89),
    )
    return SimpleNamespace(package="tensorrt", load=lambda: trt, config=config, trt=trt)


def device_job(folder: Path) -> Job:
    shapes = {"x": ([1, 1], [1, 4], [1, 8])}
    graph, plan, cache = (folder / n for n in ("model.onnx", "model.plan", "timing.cache"))
    return Job(graph, plan, (shapes,), None, timing_cache=cache)


def test_compiling_on_the_device_is_strongly_typed_and_remembers_timings(tmp_path: Path) -> None:
    calls: dict[str, Any] = {}
    (tmp_path / "timing.cache").write_bytes(b"old times")
    job = device_job(tmp_path)
    compile_graph(device_compiler(calls), job, lambda text="", steps=1: None)
    assert calls["flags"] == 1 << 1
    assert calls["known"] == [b"old times"]
    assert calls["shape"] == ("x", (1, 1), (1, 4), (1, 8))
    assert job.plan.read_bytes() == b"plan"
    assert (tmp_path / "timing.cache").read_bytes() == b"new times"


def test_timings_that_cannot_be_read_are_taken_anew(tmp_path: Path) -> None:
    calls: dict[str, Any] = {}
    (tmp_path / "timing.cache").write_bytes(b"torn")
    compile_graph(device_compiler(calls), device_job(tmp_path), lambda text="", steps=1: None)
    assert calls["known"] == [b"torn", b""]
    assert calls["used"]
    assert (tmp_path / "timing.cache").read_bytes() == b"new times"


def test_timings_of_another_gpu_are_taken_anew(tmp_path: Path) -> None:
    calls: dict[str, Any] = {}
    (tmp_path / "timing.cache").write_bytes(b"another GPU")
    compile_graph(device_compiler(calls), device_job(tmp_path), lambda text="", steps=1: None)
    assert calls["known"] == [b"another GPU", b""]
    assert (tmp_path / "timing.cache").read_bytes() == b"new times"


@pytest.mark.parametrize("cache", [None, SimpleNamespace(serialize=lambda: None)])
def test_an_engine_without_timings_is_an_engine(tmp_path: Path, cache: Any) -> None:
    compiler, job = device_compiler({}), device_job(tmp_path)
    compiler.config.get_timing_cache = lambda: cache
    compile_graph(compiler, job, lambda text="", steps=1: None)
    assert job.plan.read_bytes() == b"plan"
    assert not (tmp_path / "timing.cache").exists()


def test_what_the_compiler_does_not_take_is_said_before_it_compiles(tmp_path: Path) -> None:
    def never(network: Any, config: Any) -> bytes:
        raise AssertionError("compiled")

    compiler, job = device_compiler({}, never), device_job(tmp_path)
    compiler.config.set_compute_capability = lambda member, index: False
    asked = replace(job, capability="8.9")
    with pytest.raises(VilaDeployError, match=r"does not compile for compute capability 8\.9"):
        compile_graph(compiler, asked, lambda text="", steps=1: None)
    compiler.config.add_optimization_profile = lambda profile: -1
    with pytest.raises(VilaDeployError, match=r"does not take its shapes x \[1, 8\]"):
        compile_graph(compiler, job, lambda text="", steps=1: None)


def test_a_library_that_makes_no_builder_is_one_line(tmp_path: Path) -> None:
    def null(logger: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    compiler, job = device_compiler({}), device_job(tmp_path)
    for made, reason in ((null, "pybind11"), (lambda logger: None, "returns none")):
        compiler.trt.Builder = made
        with pytest.raises(VilaDeployError, match=f"can't make its Builder .*{reason}"):
            compile_graph(compiler, job, lambda text="", steps=1: None)


def test_an_interrupt_is_answered_when_the_compiler_has_ended(tmp_path: Path) -> None:
    """The real compiler swallows what is raised in its callbacks."""
    ended = []

    def build(network: Any, config: Any) -> bytes | None:
        assert config.progress_monitor.step_complete("layers", 1)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("raised inside the compiler")
        assert not config.progress_monitor.step_complete("layers", 2)
        ended.append(True)
        return None

    with pytest.raises(KeyboardInterrupt):
        compile_graph(
            device_compiler({}, build), device_job(tmp_path), lambda text="", steps=1: None
        )
    assert ended


def test_errors_reach_the_engine_that_they_are_about() -> None:
    """TensorRT keeps the first logger that it is given."""
    trt = SimpleNamespace(ILogger=type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0}))
    tower, llm = ErrorLog(trt), ErrorLog(trt)
    assert tower.logger is llm.logger
    tower.logger.log(2, "a warning")
    assert llm.first("none") == llm.last("none") == "none"
    tower.logger.log(1, "out of memory\nand more")
    tower.logger.log(0, "its consequence")
    later = ErrorLog(trt)
    assert (llm.first("none"), llm.last("none")) == ("out of memory", "its consequence")
    assert later.first("none") == "none"


@pytest.mark.parametrize(
    ("package", "version", "host", "fix"),
    [
        ("tensorrt-rtx", "1.5.0", "linux-x86_64", "pip install -U tensorrt-rtx"),
        ("tensorrt-rtx", "1.5.0", "linux-aarch64", "pip install -U tensorrt-rtx"),
        ("tensorrt", "10.9.0", "linux-x86_64", "install a newer TensorRT"),
        (
            "tensorrt", "10.3.0", "linux-aarch64",
            "build with --jetpack 6, or install a newer TensorRT",
        ),
    ],
)  # fmt: skip
def test_a_compiler_that_is_too_old_says_how_to_get_a_newer_one(
    package: str, version: str, host: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = SimpleNamespace(__version__=version)
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: trt)
    monkeypatch.setattr(compilers, "host_platform", lambda: host)
    with pytest.raises(VilaDeployError) as raised:
        COMPILERS[package].check_dialect("standard")
    assert raised.value.fix == fix
