"""llama.cpp's own benchmark on GGUF files of random weights at the models' shapes.

`python -m benchmarks.gpu.build_baselines llamacpp` compiles llama-bench from the sources that
get_baselines.py brings; with CUDA that takes many minutes, so it is a run of its own, elsewhere
with `--sm 90`. It is left stripped and packed beside the other baselines, to be carried along, and
unpacked where it is used. Rows are whole decoding steps, attention and all, after 512 tokens.
"""

from __future__ import annotations

import gc
import json
import lzma
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.baseline import FOLDER, Missing, brought, use_packages
from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import Q_SPREAD, config
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability

SOURCES, VERSION, BUILD = "llama.cpp.tar.xz", "llama.cpp-version.txt", FOLDER / "llama.cpp-build"
BENCH, PACKED = BUILD / "bin" / "llama-bench", FOLDER / "llama-bench.xz"
MODELS, TYPES = ("3B", "8B"), ("Q4_0", "F16")
CONTEXT, TOKENS, REPEATS = 512, 64, 3
# A block of Q4_0: 32 weights, a float16 scale and 16 bytes.
BLOCK, BLOCK_BYTES = 32, 18
# Seconds that a model may take: written, loaded, run.
LEAST_S = 10.0
# llama-bench by itself: the project's own file would want every tool.
CMAKE = """\
cmake_minimum_required(VERSION 3.18)
project(llama_bench_baseline C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(BUILD_SHARED_LIBS OFF)
set(LLAMA_BUILD_COMMON ON)
set(LLAMA_OPENSSL OFF)
find_package(Threads REQUIRED)
add_subdirectory(${SOURCES} llama)
add_subdirectory(${SOURCES}/tools/llama-bench bench)
"""


def measure_llamacpp(run: Run) -> None:
    """Add a row for each model and type of weights, if llama-bench was built."""
    try:
        version = _version()
    except Missing as error:
        run.add("skipped", "llama.cpp", reason=str(error))
        return
    if not run.rehearsed:
        # It is a process of its own, which needs what torch keeps for itself.
        gc.collect()
        torch.cuda.empty_cache()
    for model in ("3B",) if run.small else MODELS:
        for kind in TYPES:
            name = f"{model} {kind} llama.cpp"
            if run.left_s < LEAST_S:
                run.add("skipped", name, reason="no time left")
                continue
            try:
                _measure(run, model, kind, name, version)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                run.add("failed", name, reason=str(error).splitlines()[0][:200])


def _version() -> str:
    if not BENCH.exists() and PACKED.exists():
        _unpack()
    if not BENCH.exists():
        brought(SOURCES, "llamacpp")
        raise Missing(
            "run `python -m benchmarks.gpu.build_baselines llamacpp` first: it compiles llama-bench"
        )
    use_packages()
    if find_spec("gguf") is None:
        raise Missing("gguf is missing: run `python -m benchmarks.gpu.get_baselines llamacpp`")
    return brought(VERSION, "llamacpp").read_text("utf-8").strip()


def _unpack() -> None:
    BENCH.parent.mkdir(parents=True, exist_ok=True)
    partial = BENCH.with_suffix(".partial")
    partial.write_bytes(lzma.decompress(PACKED.read_bytes()))
    partial.chmod(0o755)
    partial.replace(BENCH)


def pack() -> Path:
    """Write what was built, without its symbols, into one file that may be carried."""
    # What no tool strips is carried as it is.
    subprocess.run(["strip", str(BENCH)], capture_output=True, check=False)
    PACKED.write_bytes(lzma.compress(BENCH.read_bytes(), preset=6))
    return PACKED


def _measure(run: Run, model: str, kind: str, name: str, version: str) -> None:
    sizes = config(model, "int4", small=run.small)
    path = BUILD / "model.gguf"
    try:
        weight_bytes = write_gguf(path, sizes, kind)
        row = _bench(run, path)
    finally:
        path.unlink(missing_ok=True)
    rate = float(row["avg_ts"])
    run.add(
        "step", name, version=version, weights="random", context=row["n_depth"],
        tokens_per_s=rate, milliseconds=1e3 / rate, weight_bytes=weight_bytes,
        bytes_per_s=weight_bytes * rate, flash_attention=row["flash_attn"],
    )  # fmt: skip


def _bench(run: Run, path: Path) -> dict[str, Any]:
    """Return the only row of llama-bench's JSON."""
    context, tokens = (8, 4) if run.small else (CONTEXT, TOKENS)
    command = [
        str(BENCH), "-m", str(path), "-p", "0", "-n", str(tokens), "-d", str(context),
        "-r", str(REPEATS), "-ngl", "0" if run.rehearsed else "99", "-fa", "on", "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=max(1.0, run.left_s), check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"llama-bench exits with {done.returncode}: {last}")
    (row,) = json.loads(done.stdout)
    if row["n_gen"] != tokens or row["n_depth"] != context:
        raise ValueError(f"llama-bench ran {row['n_gen']} tokens behind {row['n_depth']}")
    return dict(row)


def write_gguf(path: Path, sizes: LlmConfig, kind: str) -> int:
    """Write a llama model of random weights; return the bytes of weights that a step reads.

    Layers in `kind`, Q4_0 or F16; embeddings and lm_head in F16, as in our own steps. Tensors of
    one shape are the same numbers.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.rope_theta)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0 if kind == "Q4_0" else 1)
    # No tokenizer: llama-bench draws token ids.
    writer.add_tokenizer_model("none")
    made: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}
    read = 0
    for name, shape, as_kind in _tensors(sizes, kind):
        if (as_kind, shape) not in made:
            made[as_kind, shape] = MAKERS[as_kind](shape)
        data = made[as_kind, shape]
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[as_kind])
        read += 0 if name == "token_embd.weight" else data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _tensors(sizes: LlmConfig, kind: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield name, shape [out, in] and type of each tensor, under llama.cpp's names."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    yield "token_embd.weight", (sizes.vocab_size, hidden), "F16"
    for index in range(sizes.num_layers):
        block = f"blk.{index}"
        for name in ("attn_norm", "ffn_norm"):
            yield f"{block}.{name}.weight", (hidden,), "F32"
        for name, shape in {
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }.items():
            yield f"{block}.{name}.weight", shape, kind
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (sizes.vocab_size, hidden), "F16"


def _floats(shape: tuple[int, ...]) -> NDArray[Any]:
    random = np.random.default_rng(0).standard_normal(shape, np.float32)
    return (random * shape[-1] ** -0.5).astype(np.float16)


def _blocks(shape: tuple[int, ...]) -> NDArray[Any]:
    """Return uint8 [out, in / 32 · 18]: any quantized values, with scales of unit gain."""
    rows, blocks = shape[0], shape[1] // BLOCK
    data = np.random.default_rng(0).integers(0, 256, (rows, blocks, BLOCK_BYTES), np.uint8)
    scale = np.array([shape[1] ** -0.5 / Q_SPREAD], "<f2").view(np.uint8)
    data[..., :2] = scale
    return data.reshape(rows, blocks * BLOCK_BYTES)


MAKERS: dict[str, Callable[[tuple[int, ...]], NDArray[Any]]] = {
    "F16": _floats,
    "F32": lambda shape: np.ones(shape, np.float32),
    "Q4_0": _blocks,
}


def build(sm: int | None = None) -> Path:
    """Compile llama-bench and pack it.

    Args:
        sm: of the GPU, 90 for compute capability 9.0; None: the one that is here, or the CPU.
    """
    if sm is not None:
        capability = ComputeCapability(*divmod(sm, 10))
    elif torch.cuda.is_available():
        capability = ComputeCapability(*torch.cuda.get_device_capability())
    else:
        capability = INTERPRETER
    build_for(capability)
    return pack()


def build_for(capability: ComputeCapability) -> None:
    """Build for a GPU of this compute capability, or for this CPU if it is INTERPRETER."""
    sources, project = (BUILD / "sources").resolve(), BUILD / "project"
    with tarfile.open(brought(SOURCES, "llamacpp")) as packed:
        # Python before 3.11.4 has no filters, and takes the package index's files as they are.
        packed.extraction_filter = getattr(tarfile, "data_filter", None)
        packed.extractall(sources)
    project.mkdir(parents=True, exist_ok=True)
    (project / "CMakeLists.txt").write_text(CMAKE, "utf-8")
    flags = ["-DCMAKE_BUILD_TYPE=Release", f"-DSOURCES={sources}"]
    if capability != INTERPRETER:
        # No memory pool of the driver's, whose library isn't always there to link with.
        flags += [
            "-DGGML_CUDA=ON",
            "-DGGML_CUDA_NO_VMM=ON",
            f"-DCMAKE_CUDA_ARCHITECTURES={capability.sm}",
        ]
        flags += _cublas_of_torch()
    subprocess.run(
        ["cmake", "-G", "Ninja", "-S", str(project), "-B", str(BUILD), *flags], check=True
    )
    jobs = str(len(os.sched_getaffinity(0)))
    subprocess.run(
        ["cmake", "--build", str(BUILD), "--target", "llama-bench", "-j", jobs], check=True
    )


def _cublas_of_torch() -> list[str]:
    """Return where CMake finds cuBLAS if only torch's wheels brought it, without links."""
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for root in sorted(Path(folder).glob("cu[0-9]*")):
            libraries = {p.name.split(".so")[0]: p for p in (root / "lib").glob("libcublas*.so.*")}
            if "libcublas" not in libraries:
                continue
            links = BUILD / "lib"
            links.mkdir(parents=True, exist_ok=True)
            for name, path in libraries.items():
                (links / f"{name}.so").unlink(missing_ok=True)
                (links / f"{name}.so").symlink_to(path)
            include, lib = f"-isystem {root / 'include'}", root / "lib"
            return [
                f"-DCMAKE_LIBRARY_PATH={links}", f"-DCMAKE_CXX_FLAGS={include}",
                f"-DCMAKE_CUDA_FLAGS={include}",
                f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,-rpath-link,{lib} -Wl,-rpath,{lib}",
            ]  # fmt: skip
    return []
