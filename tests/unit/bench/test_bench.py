"""vila-bench: rows of a CPU and of a GPU, tables of both, engines with random weights."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support import fake_tensorrt
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import backend as tensorrt_backend
from vila_deploy.backends.tensorrt import compile_worker, compilers, cuda
from vila_deploy.backends.tensorrt.compile import Job
from vila_deploy.bench import conditions, gpu
from vila_deploy.bench import measure as measure_module
from vila_deploy.bench.conditions import device_name, versions
from vila_deploy.bench.first_token import UNTOKENIZED_CHUNKS, noise_image
from vila_deploy.bench.gpu import gpu_name
from vila_deploy.bench.measure import DECODE_TOKENS, measure
from vila_deploy.bench.random_engine import random_engine_length
from vila_deploy.bench.table import render_rows
from vila_deploy.builder.build import build_engine, build_random_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.presets import PRESETS, preset
from vila_deploy.cli.bench import main
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.target import get_target
from vila_deploy.processing.images import preprocess
from vila_deploy.runtime.open_engine import OpenedEngine, open_engine
from vila_deploy.utils.errors import VilaDeployError

CPU_TITLES = ("| peak MB |", "| of read bandwidth")
GPU_TITLES = ("| host peak MB |", "| of bandwidth")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    root = make_checkpoint(folder / "c", max_length=1024)
    build_engine(root, folder / "engine", BuildOptions("cpu"))
    return folder / "engine"


@pytest.fixture(scope="module")
def cpu_row(engine: Path) -> dict[str, Any]:
    return measure(engine)


@pytest.fixture
def gpu_row(engine: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The engine measured as if an Orin had run it, whose bandwidth this computer doesn't read."""

    @contextmanager
    def open_on_orin(folder: Path) -> Iterator[OpenedEngine]:
        with open_engine(folder) as opened:
            built_with = {"tensorrt": "10.3.0", "compute-capability": "8.7", "numpy": "1.0"}
            changes = {"target": "orin", "backend": "tensorrt", "versions": built_with}
            yield replace(opened, manifest=replace(opened.manifest, **changes))

    gpu = fake_tensorrt.install(monkeypatch, "tensorrt", "10.3.0", "8.7")
    name_gpu(gpu, b"Orin\0\0")
    monkeypatch.setattr(measure_module, "open_engine", open_on_orin)
    monkeypatch.setattr(
        measure_module, "read_bandwidth_bytes_per_s", lambda size: pytest.fail("the host's")
    )
    return measure(engine)


def name_gpu(gpu: Any, name: bytes) -> None:
    gpu.cudaGetDeviceProperties = lambda device: (0, SimpleNamespace(name=name))


def test_a_row_of_a_cpu(cpu_row: dict[str, Any]) -> None:
    assert "host" not in cpu_row
    # The clock differs from call to call.
    assert cpu_row["device"].partition(",")[0] == device_name().partition(",")[0]
    assert cpu_row["bandwidth_label"] == "measured"
    share = cpu_row["weight_bytes_per_token"] * cpu_row["decode_tokens_per_s"]
    expected = share / cpu_row["read_bandwidth_bytes_per_s"]
    assert cpu_row["roofline_fraction"] == pytest.approx(expected)
    assert cpu_row["versions"]["onnxruntime"] == version("onnxruntime")


def test_a_row_of_a_gpu_names_it_and_takes_the_published_bandwidth(
    gpu_row: dict[str, Any],
) -> None:
    assert gpu_row["device"] == "Orin"
    assert gpu_row["host"].partition(",")[0] == device_name().partition(",")[0]
    assert gpu_row["bandwidth_label"] == "published"
    assert gpu_row["read_bandwidth_bytes_per_s"] == get_target("orin").bandwidth_bytes_per_s
    share = gpu_row["weight_bytes_per_token"] * gpu_row["decode_tokens_per_s"]
    assert gpu_row["roofline_fraction"] == pytest.approx(share / 2.048e11)
    found = gpu_row["versions"]
    assert (found["tensorrt"], found["compute-capability"]) == ("10.3.0", "8.7")
    assert found["numpy"] == version("numpy"), "what is installed here is what runs"


def test_tables_title_what_was_measured(cpu_row: dict[str, Any], gpu_row: dict[str, Any]) -> None:
    alone = render_rows([cpu_row], "md")
    assert all(title in alone for title in CPU_TITLES)
    assert alone.splitlines()[-1] == f"measured on {cpu_row['device']}"
    assert "published" not in alone
    for rows in ([gpu_row], [cpu_row, gpu_row]):
        table = render_rows(rows, "md")
        assert all(title in table for title in GPU_TITLES)
        assert "of 204.8 GB/s (published) |" in table
        assert table.endswith(f"measured on Orin, host {gpu_row['host']}")
    unknown = {**gpu_row, "read_bandwidth_bytes_per_s": None, "roofline_fraction": None}
    assert render_rows([unknown], "md").splitlines()[2].split("|")[-2].strip() == "?"
    lines = list(csv.DictReader(io.StringIO(render_rows([cpu_row, gpu_row], "csv"))))
    assert [line["host"] for line in lines] == ["", gpu_row["host"]]
    assert [line["versions.tensorrt"] for line in lines] == ["", "10.3.0"]


def test_what_is_not_installed_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson as docs/orin.md sets it up has no onnxruntime."""

    def without(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(conditions, "version", without)
    assert versions().keys() == {"vila-deploy", "python", "numpy"}
    assert versions({"onnxruntime": "1.0"})["onnxruntime"] == "1.0"


def test_each_backend_asks_its_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vila_deploy.backends.native import loading
    from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability

    assert gpu_name(get_target("cpu"), "onnxruntime") is None
    target = get_target("h100")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cuda, "runtime", lambda: pytest.fail("not of this backend"))
    assert gpu_name(target, "tensorrt-llm") == "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(loading, "find_device", lambda: ("cuda", ComputeCapability(9, 0)))
    assert gpu_name(target, "native") == "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(loading, "find_device", lambda: ("cpu", INTERPRETER))
    assert gpu_name(target, "native") is None, "Triton's interpreter"


@pytest.fixture
def tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every released model has the shapes of a tiny one; compiling writes a word."""
    config = open_checkpoint(make_checkpoint(tmp_path / "c", max_length=1024)).config
    monkeypatch.setattr("vila_deploy.checkpoint.presets.preset", lambda model, precision: config)

    def compile_graph(compiler: Any, job: Job, advance: Any) -> None:
        job.plan.write_text("engine")

    monkeypatch.setattr(compile_worker, "compile_graph", compile_graph)


def pretend_host(monkeypatch: pytest.MonkeyPatch, platform: str, version: str) -> None:
    monkeypatch.setattr(tensorrt_backend, "host_platform", lambda: platform)
    trt = SimpleNamespace(__version__=version)
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: trt)
    monkeypatch.setattr(cuda, "compute_capability", lambda: "8.7")


def test_random_weights_are_finished_on_the_board(
    tmp_path: Path, tiny_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_host(monkeypatch, "linux-aarch64", "10.3.0")
    manifest = build_random_engine("VILA1.5-3b", "fp16", "orin-nano", tmp_path / "engine")
    assert manifest.pending_steps == ()
    assert load_manifest(tmp_path / "engine") == manifest
    assert manifest.versions["tensorrt"] == "10.3.0"


def test_random_weights_for_a_board_elsewhere_are_refused_before_any_work(
    tiny_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_host(monkeypatch, "linux-x86_64", "10.3.0")
    monkeypatch.setattr("vila_deploy.builder.build.new_folder", lambda out: pytest.fail("began"))
    done = CliRunner().invoke(
        main, ["--model", "VILA1.5-3b", "--random-weights", "--target", "orin"]
    )
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "orin can't be finished here (TensorRT compiles it on linux-aarch64, this is" in line
    assert line.endswith(
        "build one from a checkpoint with vila-build-engine, finish it on the device and give its "
        "folder to vila-bench there"
    )


def test_random_weights_on_a_board_without_tensorrt_say_so_before_any_work(
    tmp_path: Path, tiny_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_backend, "host_platform", lambda: "linux-aarch64")
    monkeypatch.setattr("vila_deploy.builder.build.new_folder", lambda out: pytest.fail("began"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(VilaDeployError, match=r"tensorrt can't be loaded .*; on Jetson: sudo apt"):
        build_random_engine("VILA1.5-3b", "fp16", "orin", tmp_path / "engine")


@pytest.mark.parametrize("target", ["rtx4090", "h100"])
def test_random_weights_without_a_gpu_are_refused_before_any_work(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila_deploy.builder.build.new_folder", lambda out: pytest.fail("began"))
    monkeypatch.setattr("vila_deploy.backends.native.loading.INTERPRETED", False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def no_driver() -> None:
        raise VilaDeployError("no CUDA driver", fix="run this on the target")

    monkeypatch.setattr(cuda, "runtime", no_driver)
    flags = ["--model", "VILA1.5-3b", "--random-weights", "--target", target]
    done = CliRunner().invoke(main, flags)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "CUDA" in line


def test_random_weights_that_memory_is_too_small_for(
    tiny_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_host(monkeypatch, "linux-x86_64", "1.7.1")
    monkeypatch.setattr(tensorrt_backend, "available_memory_bytes", lambda: 1 << 28)
    monkeypatch.setattr(gpu, "gpu_name", lambda *_: "NVIDIA GeForce RTX 4090")
    done = CliRunner().invoke(
        main, ["--model", "VILA1.5-3b", "--random-weights", "--target", "rtx4090"]
    )
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert "for rtx4090 can't be finished here (compiling takes about 0.4 GB of memory, " in last
    assert "finish it on a computer with more memory" in last
    assert "vila-bench-" not in last, "names a folder that has gone"


@pytest.mark.parametrize("model", PRESETS)
def test_random_engines_hold_the_benchmark(model: str, tmp_path: Path, roomy: None) -> None:
    info = ModelInfo.from_config(preset(model, "int4"), None)
    (pixels,) = preprocess([noise_image()], info.image, info.tiling)
    image_tokens = info.image_tokens(pixels)
    needed = sum(map(len, UNTOKENIZED_CHUNKS)) + sum(image_tokens) + DECODE_TOKENS
    assert random_engine_length(model, "int4", "cpu", tmp_path) >= needed


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vila_deploy.engine.memory.available_memory_bytes", lambda: 10**13)
    free = SimpleNamespace(free=10**13)
    monkeypatch.setattr("vila_deploy.bench.random_engine.shutil.disk_usage", lambda _: free)


@pytest.mark.parametrize(
    ("where", "small", "message"),
    [
        ("vila_deploy.engine.memory.available_memory_bytes", 10**9, "VILA1.5-40b in fp16 needs 16"),
        (
            "vila_deploy.bench.random_engine.shutil.disk_usage", SimpleNamespace(free=10**9),
            "VILA1.5-40b in fp16 needs 8",
        ),
    ],
    ids=["memory", "disk"],
)  # fmt: skip
def test_random_weights_without_room_are_refused_before_any_work(
    where: str, small: object, message: str, roomy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vila_deploy.builder.build.new_folder", lambda out: pytest.fail("began"))
    monkeypatch.setattr(where, lambda *_: small)
    flags = ["--model", "VILA1.5-40b", "--random-weights", "--precision", "fp16"]
    done = CliRunner().invoke(main, flags)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert message in line
