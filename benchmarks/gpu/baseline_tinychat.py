"""TinyChat's second kernels (GEMV up to 7 rows, GEMM above), compiled here from gptqmodel's sdist.

`python -m benchmarks.gpu.build_baselines tinychat` compiles them, a minute with nvcc; the benchmark
begins that in the background. The published kernels run on CUDA's default stream, which no graph
can capture; in the copy that is compiled they run on the harness's stream. Nothing else changes.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gpu.baseline import (
    FOLDER,
    Baseline,
    Missing,
    Opened,
    Prepared,
    brought,
    needs_cuda,
    size_bytes,
)
from benchmarks.gpu.environment import Run
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.tinychat import TINYCHAT_V2

SOURCES, BUILD, NAME = "tinychat", FOLDER / "tinychat-build", "tinychat_baseline"
VERSION = "version.txt"
KERNELS = ("gemm/gemm_cuda.cu", "gemv/gemv_cuda.cu")
# Launches in each, all without a stream.
LAUNCHES = {"gemm_cuda.cu": 2, "gemv_cuda.cu": 7}
STREAM = "vila_deploy_stream"
# Rows up to which TinyChat takes its GEMV.
GEMV_ROWS = 7
BINDING = f"""\
#include <torch/extension.h>
#include <cuda_runtime.h>
#include "gemm/gemm_cuda.h"
#include "gemv/gemv_cuda.h"
cudaStream_t {STREAM} = nullptr;
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {{
  m.def("use_stream", [](int64_t s) {{ {STREAM} = reinterpret_cast<cudaStream_t>(s); }});
  m.def("gemm", &gemm_forward_cuda_prefill);
  m.def("gemv", &gemv_forward_cuda_decode);
}}
"""
# torch forbids these operators by default, TinyChat's kernels use them.
FLAGS = [
    "-O3", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__", "--expt-relaxed-constexpr", "--expt-extended-lambda",
    "--use_fast_math",
]  # fmt: skip


def open_baseline(run: Run) -> Opened:
    needs_cuda(run)
    folder = brought(SOURCES, "tinychat")
    if not _library().exists():
        raise Missing("not compiled: rows of the stage `prepare` say why, or run that first")
    module = _import(_library())
    version = (folder / VERSION).read_text("utf-8").strip()
    return Opened(version, lambda linear: prepare(linear, module))


def prepare(linear: QuantizedLinear, module: ModuleType) -> Prepared:
    packed = TINYCHAT_V2.pack(linear)
    weight, scales, zeros = (packed[name].contiguous() for name in TINYCHAT_V2.tensors)
    out, inner = linear.out_features, linear.in_features

    def call(x: Tensor) -> Tensor:
        module.use_stream(torch.cuda.current_stream().cuda_stream)
        if len(x) <= GEMV_ROWS:
            return module.gemv(x, weight, scales, zeros, len(x), out, inner, linear.group_size)
        return module.gemm(x, weight, scales, zeros)

    groups = inner // linear.group_size
    return Prepared(call, size_bytes(weight, scales[:groups], zeros[:groups]))


def write_sources(sources: Path, folder: Path) -> list[Path]:
    """Write the kernels of `sources` to `folder`, launched on our CUDA stream, and the binding.

    Raises:
        Missing: the sources are not those that this was written for.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources, folder)
    binding = folder / "quantization_new" / "binding.cpp"
    binding.write_text(BINDING, "utf-8")
    written = [binding]
    for name in KERNELS:
        path = folder / "quantization_new" / name
        text = path.read_text("utf-8")
        text, count = re.subn(r"(<<<[^<>]*,[^<>]*,[^<>]*)>>>", rf"\1, {STREAM}>>>", text)
        if count != LAUNCHES[path.name]:
            raise Missing(f"{name} has {count} launches, expected {LAUNCHES[path.name]}")
        head = f"#include <cuda_runtime.h>\nextern cudaStream_t {STREAM};\n"
        path.write_text(head + text, "utf-8")
        written.append(path)
    return written


def _library() -> Path:
    return BUILD / f"{NAME}.so"


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> Path:
    """Compiles for the GPU that is here; the module."""
    from torch.utils.cpp_extension import load

    sources = [str(path) for path in write_sources(brought(SOURCES, "tinychat"), BUILD)]
    load(
        NAME, sources, extra_cuda_cflags=FLAGS, build_directory=str(BUILD),
        extra_include_paths=[str(BUILD / "quantization_new")],
    )  # fmt: skip
    return _library()


BASELINES = (Baseline("tinychat int4", open_baseline),)
