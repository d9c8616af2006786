"""Others' kernels in the GPU benchmark: layouts, calls, and what happens where one isn't there."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import (
    baseline,
    baseline_llamacpp,
    baseline_tinychat,
    baseline_vllm,
    build_baselines,
    get_baselines,
    products,
)
from benchmarks.gpu.baseline import Baseline, Missing, Opened, Prepared, random_quantized
from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import config
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.tinychat import TINYCHAT_V2
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability

# sha256 of weights, scales and zeros as vLLM 0.26.0's own code for its tests packs `numbers`.
BY_VLLM = {
    (64, 256): ("6b43d48a09fcd674", "f56a8c63f3e098a3", "072c5378dc5ecace"),
    (192, 384): ("8654d90eda315d1e", "03644f63f1108a75", "105e40a13c5b9226"),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("cpu", INTERPRETER, 600.0, tmp_path / "rows.jsonl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (baseline, baseline_tinychat, baseline_vllm, baseline_llamacpp):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "baselines")
    (tmp_path / "baselines").mkdir()
    return tmp_path / "baselines"


def numbers(out: int, inner: int) -> QuantizedLinear:
    groups = torch.arange(out * inner // 128).reshape(out, -1)
    q = torch.arange(out * inner).reshape(out, inner) * 7919 // 13 % 16
    scale = (groups + 1).half() / 64
    return QuantizedLinear(q.to(torch.uint8), scale, (groups * 5 % 16).to(torch.uint8))


@pytest.mark.parametrize("shape", BY_VLLM)
def test_marlin_s_layout_is_vllm_s(shape: tuple[int, int]) -> None:
    packed = baseline_vllm.pack_marlin(numbers(*shape))
    found = tuple(hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in packed)
    assert found == BY_VLLM[shape]


@pytest.fixture
def operators() -> Iterator[dict[str, Callable[..., Any]]]:
    """vLLM's operators under their real schemas; what each does is put into the dictionary."""
    library = torch.library.Library("_C", "FRAGMENT")
    implementations: dict[str, Callable[..., Any]] = {}
    for name, schema in baseline_vllm.SCHEMAS.items():
        library.define(schema.removeprefix("_C::"))
        library.impl(name, lambda *args, name=name: implementations[name](*args), "CPU")
    yield implementations
    library._destroy()


def levels(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, n] → [rows, 8 n], lowest bits first."""
    return ((words[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(1).float()


def test_machete_gets_levels_along_k_and_zeros_times_scales(operators: Any) -> None:
    def product(
        x: Any, weight: Any, kind: int, out: Any, scales: Any, zeros: Any, group: int, *rest: Any
    ) -> Any:
        assert (kind, out, rest) == (baseline_vllm.UINT4, None, (None, None, None))
        # The library wants words of one output channel next to each other.
        assert weight.T.is_contiguous()
        wide = [part.float().repeat_interleave(group, 0) for part in (scales, zeros)]
        return (x.float() @ (levels(weight.T).T * wide[0] + wide[1])).half()

    operators["machete_prepack_B"] = lambda weight, *_: weight
    operators["machete_mm"] = product
    linear = random_quantized(128, 256, "cpu")
    prepared = baseline_vllm.prepare_machete(linear)
    x = torch.randn(2, 256).half()
    assert baseline.error_of(prepared.call(x), x, linear.dequantize()) < 2e-3
    assert prepared.size_bytes == 128 * 256 // 2 + 128 * 2 * 4


def test_marlin_is_called_as_the_library_wants_it(operators: Any) -> None:
    seen: list[tuple[Any, ...]] = []

    def product(*args: Any) -> Any:
        seen.append(args)
        return torch.zeros(args[12], args[13], dtype=torch.float16)

    operators["marlin_gemm"] = product
    prepared = baseline_vllm.prepare_marlin(random_quantized(192, 256, "cpu"), units=7)
    assert prepared.call(torch.randn(3, 256).half()).shape == (3, 192)
    (args,) = seen
    names = [a.name for a in torch.ops._C.marlin_gemm.default._schema.arguments]
    given = dict(zip(names, args, strict=True))
    assert [name for name, value in given.items() if value is None] == [
        "c_or_none", "b_bias_or_none", "a_scales", "global_scale"
    ]  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in given.items() if isinstance(v, torch.Tensor)}
    assert shapes == {
        "a": (3, 256), "b_q_weight": (16, 384), "b_scales": (2, 192), "b_zeros_or_none": (2, 24),
        "g_idx_or_none": (0,), "perm_or_none": (0,), "workspace": (7,),
    }  # fmt: skip
    assert [given[f"size_{x}"] for x in "mnk"] == [3, 192, 256]
    flags = {k: v for k, v in given.items() if isinstance(v, bool)}
    assert [name for name, value in flags.items() if value] == ["is_k_full", "use_fp32_reduce"]
    assert prepared.size_bytes == 192 * 256 // 2 + 192 * 2 * 2 + 192 * 2 // 2


def test_a_library_that_does_not_load_says_for_which_torch_it_is(folder: Path) -> None:
    wheel = folder.parent / "vllm-0.whl"
    with zipfile.ZipFile(wheel, "w") as written:
        written.writestr("vllm/_C_stable_libtorch.abi3.so", b"no library")
        written.writestr("vllm-0.dist-info/METADATA", "Name: vllm\nRequires-Dist: torch==2.11.0\n")
    get_baselines._keep_vllm(wheel, folder, None)
    baseline_vllm.unpacked.cache_clear()
    with pytest.raises(Missing, match=r"does not load: .*, for torch 2\.11\.0, this is torch 2"):
        baseline_vllm.load("marlin_gemm")
    baseline_vllm.unpacked.cache_clear()


def test_operators_of_another_version_are_left_alone(
    operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline_vllm.check_schemas("machete_mm")
    monkeypatch.setitem(baseline_vllm.SCHEMAS, "machete_mm", "_C::machete_mm(Tensor A) -> Tensor")
    with pytest.raises(Missing, match="another version"):
        baseline_vllm.check_schemas("machete_mm")


def test_tinychat_gets_its_layout_stream_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, streams = random_quantized(64, 1280, "cpu"), list[int]()

    def product(x: Any, weight: Any, scales: Any, zeros: Any, *rest: int) -> Any:
        if rest:
            assert rest == (len(x), 64, 1280, 128)
        names = ("qweight", "scales", "scaled_zeros")
        tensors = dict(zip(names, (weight, scales, zeros), strict=True))
        scaled = TINYCHAT_V2.unpack(tensors, 128)
        return (x.float() @ scaled.dequantize().T).half()

    module: Any = SimpleNamespace(use_stream=streams.append, gemv=product)
    module.gemm = lambda *args: product(*args) * 2
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    prepared = baseline_tinychat.prepare(linear, module)
    few, many = torch.randn(7, 1280).half(), torch.randn(8, 1280).half()
    weight = linear.dequantize()
    assert baseline.error_of(prepared.call(few), few, weight) < 2e-3
    assert baseline.error_of(prepared.call(many) / 2, many, weight) < 2e-3
    assert streams == [5, 5]
    # Rows of padding behind the ten groups aren't read.
    assert prepared.size_bytes == 64 * 1280 // 2 + 2 * 2 * 64 * 10


def tinychat_sources(folder: Path, launches: dict[str, int]) -> Path:
    for name in baseline_tinychat.KERNELS:
        path = folder / "quantization_new" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ["  kernel<1, 2><<<blocks, dim3(32, 4), bytes>>>(a, b);"] * launches[path.name]
        path.write_text("\n".join(["// old<<<blocks, threads>>>(a);", *lines]), "utf-8")
    return folder


def test_tinychat_is_compiled_for_a_stream_that_graphs_capture(tmp_path: Path) -> None:
    sources = tinychat_sources(tmp_path / "in", baseline_tinychat.LAUNCHES)
    binding, *kernels = baseline_tinychat.write_sources(sources, tmp_path / "out")
    assert baseline_tinychat.STREAM in binding.read_text("utf-8")
    for path in kernels:
        text = path.read_text("utf-8")
        launched = text.count(f", bytes, {baseline_tinychat.STREAM}>>>")
        assert launched == baseline_tinychat.LAUNCHES[path.name]
        assert f"extern cudaStream_t {baseline_tinychat.STREAM};" in text
    fewer = tinychat_sources(tmp_path / "other", {**baseline_tinychat.LAUNCHES, "gemv_cuda.cu": 6})
    with pytest.raises(Missing, match="6 launches, expected 7"):
        baseline_tinychat.write_sources(fewer, tmp_path / "out")


def fat_binary(*entries: tuple[int, int, int]) -> bytes:
    """Entries of (kind, compute capability · 10, byte that fills them)."""
    content = b"".join(
        struct.pack("<HHIQ", kind, 0x101, 64, 80) + bytes(12) + struct.pack("<I", sm) + bytes(32)
        + bytes([fill]) * 80
        for kind, sm, fill in entries
    )  # fmt: skip
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def test_code_for_other_gpus_is_dropped_in_place() -> None:
    mixed = fat_binary((2, 80, 1), (2, 90, 2), (1, 80, 3), (2, 100, 4))
    other = fat_binary((2, 100, 5), (2, 120, 6))
    library = bytearray(b"head" * 5 + mixed + b"mid" + other + b"tail")
    assert get_baselines.drop_other_code(library, 90) == (3, 3)
    left = fat_binary((2, 90, 2), (1, 80, 3))
    alone = fat_binary((2, 100, 5))
    expected = b"head" * 5 + left.ljust(len(mixed), b"\0") + b"mid"
    assert library == expected + alone.ljust(len(other), b"\0") + b"tail"


def sdist(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    return path


def test_of_an_sdist_only_what_is_needed_is_kept(tmp_path: Path) -> None:
    root = "llama_cpp_python-1/vendor/llama.cpp"
    kept = [
        "CMakeLists.txt", "ggml/CMakeLists.txt", "ggml/src/ggml.c", "ggml/src/ggml-cuda/a.cu",
        "tools/llama-bench/main.cpp", "vendor/hash/a.h",
    ]  # fmt: skip
    others = ["tools/server/a.cpp", "ggml/src/ggml-metal/a.m", "models/a.gguf", "gguf-py/gguf/b.py"]
    archive = sdist(tmp_path / "a.tar.gz", *(f"{root}/{name}" for name in kept + others))
    get_baselines._keep_llamacpp(archive, tmp_path, None)
    with tarfile.open(tmp_path / "llama.cpp.tar.xz") as found:
        assert found.getnames() == kept
    assert (tmp_path / "python" / "gguf" / "b.py").exists()
    with pytest.raises(ValueError, match="nothing below"):
        get_baselines._keep_gemlite(archive, tmp_path, None)
    bad = sdist(tmp_path / "b.tar.gz", "x/gemlite/../../../../out.py")
    with pytest.raises(ValueError, match="leads outside"):
        get_baselines._keep_gemlite(bad, tmp_path, None)


def rows_of(run: Run, kind: str) -> list[dict[str, Any]]:
    return [row for row in run.rows if row["kind"] == kind]


def test_a_baseline_that_computes_something_else_is_not_timed(run: Run) -> None:
    def wrong(linear: QuantizedLinear) -> Prepared:
        weight = linear.dequantize().half().flip(1)
        return Prepared(lambda x: torch.nn.functional.linear(x, weight), 1)

    def broken(_: Run) -> Opened:
        raise RuntimeError("no such kernel\nand more")

    def absent(_: Run) -> Opened:
        raise Missing("not here")

    baselines = (
        Baseline("wrong int4", lambda _: Opened("1.2", wrong)), Baseline("broken int4", broken),
        Baseline("absent int4", absent),
    )  # fmt: skip
    products._measure_all(run, baselines)
    first, second = rows_of(run, "failed")
    assert "against float32, not timed" in first["reason"]
    assert (second["name"], second["reason"]) == ("broken int4", "RuntimeError: no such kernel")
    assert [(r["name"], r["reason"]) for r in rows_of(run, "skipped")] == [
        ("absent int4", "not here")
    ]
    assert not rows_of(run, "product") + rows_of(run, "step_products")


def test_products_of_baselines_stand_beside_our_whole_step(run: Run) -> None:
    for name, ms in (("8B int4", 2.0), ("8B int4, lm-head int4", 1.0)):
        run.add("step", name, milliseconds=ms)
    for name in ("ours", "tinychat"):
        run.add("step_products", f"8B step {name} int4", milliseconds=3.0)
    products.compare(run, "tinychat int4")
    (row,) = rows_of(run, "ratio")
    assert (row["name"], row["ratio"]) == ("8B products of tinychat int4 / whole step of ours", 1.5)


def test_without_its_files_every_baseline_says_how_to_get_them(run: Run, folder: Path) -> None:
    on_device = SimpleNamespace(rehearsed=False, capability=ComputeCapability(9, 0), device="cuda")
    for each in products.BASELINES:
        if not each.name.startswith("tinygemm"):
            with pytest.raises(Missing, match="get_baselines"):
                each.open(on_device)  # type: ignore[arg-type]
    baseline_llamacpp.measure_llamacpp(run)
    assert "get_baselines" in rows_of(run, "skipped")[0]["reason"]


@pytest.mark.parametrize("name", build_baselines.NAMES)
def test_nothing_is_compiled_without_sources(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baseline_llamacpp, "BUILD", folder / "build")
    monkeypatch.setattr(sys, "argv", ["build_baselines", name])
    assert build_baselines.main() == 1
    assert f"get_baselines {name}" in capsys.readouterr().err


@pytest.fixture
def llama_bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Stands in for llama-bench: a program that runs `code` with `arguments`."""
    monkeypatch.setattr(baseline_llamacpp, "BUILD", folder)
    monkeypatch.setattr(baseline_llamacpp, "BENCH", folder / "llama-bench")
    monkeypatch.setattr(baseline_llamacpp, "PACKED", folder / "llama-bench.xz")
    (folder / baseline_llamacpp.VERSION).write_text("llama.cpp 1\n", "utf-8")

    def write(code: str) -> None:
        head = "#!/usr/bin/env python3\nimport json, sys\narguments = sys.argv[1:]\n"
        (folder / "llama-bench").write_text(head + code, "utf-8")
        (folder / "llama-bench").chmod(0o755)

    return write


def test_a_packed_llama_bench_is_unpacked_where_it_is_used(
    run: Run, llama_bench: Any, folder: Path
) -> None:
    """As it comes to a machine on which nothing is compiled."""
    llama_bench("print('unpacked', file=sys.stderr); sys.exit(3)\n")
    packed = baseline_llamacpp.pack()
    (folder / "llama-bench").unlink()
    assert packed.exists()
    baseline_llamacpp.measure_llamacpp(run)
    assert rows_of(run, "failed")[0]["reason"] == "llama-bench exits with 3: unpacked"


def test_llama_bench_is_compiled_for_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(baseline_llamacpp, "build_for", asked.append)
    monkeypatch.setattr(baseline_llamacpp, "pack", Path)
    monkeypatch.setattr(sys, "argv", ["build_baselines", "llamacpp", "--sm", "90"])
    assert build_baselines.main() == 0
    assert asked == [ComputeCapability(9, 0)]


def test_llama_bench_s_answer_becomes_rows(run: Run, llama_bench: Any, folder: Path) -> None:
    llama_bench(
        "given = dict(zip(arguments[::2], arguments[1::2]))\n"
        "assert open(given['-m'], 'rb').read(4) == b'GGUF'\n"
        "assert (given['-p'], given['-fa'], given['-o']) == ('0', 'on', 'json')\n"
        "print(json.dumps([dict(avg_ts=50.0, n_gen=int(given['-n']), n_depth=int(given['-d']),"
        " flash_attn=True)]))\n"
    )
    baseline_llamacpp.measure_llamacpp(run)
    small, large = rows_of(run, "step")
    assert [row["name"] for row in (small, large)] == ["3B Q4_0 llama.cpp", "3B F16 llama.cpp"]
    assert small["milliseconds"] == 20.0
    assert small["weight_bytes"] < large["weight_bytes"]
    assert not list(folder.glob("*.gguf"))
    llama_bench("print('out of memory', file=sys.stderr); sys.exit(3)\n")
    baseline_llamacpp.measure_llamacpp(run)
    assert rows_of(run, "failed")[0]["reason"] == "llama-bench exits with 3: out of memory"


def test_gguf_has_the_model_s_shapes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    sizes = config("8B", "int4", small=True)
    read = baseline_llamacpp.write_gguf(tmp_path / "m.gguf", sizes, "Q4_0")
    found = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert read == sum(t.n_bytes for name, t in tensors.items() if name != "token_embd.weight")
    assert len(tensors) == 3 + 9 * sizes.num_layers
    down = tensors["blk.0.ffn_down.weight"]
    assert (list(down.shape), down.tensor_type.name) == ([256, 128], "Q4_0")
    weight = gguf.quants.dequantize(down.data, down.tensor_type)
    assert weight.shape == (128, 256)
    # Of unit gain, if levels are any of 16.
    assert 0.8 < float(np.std(weight)) * 256**0.5 < 1.2
    heads = {name: int(found.fields[f"llama.attention.{name}"].parts[-1][0])
             for name in ("head_count", "head_count_kv")}  # fmt: skip
    assert heads == {"head_count": sizes.num_heads, "head_count_kv": sizes.num_kv_heads}
    assert json.dumps([float(found.fields["llama.rope.freq_base"].parts[-1][0])]) == "[500000.0]"
