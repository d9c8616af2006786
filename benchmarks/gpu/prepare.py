"""Before anything is timed: kernels and baselines are compiled, the engine is tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from benchmarks.gpu import baseline_tinychat, baseline_vllm
from benchmarks.gpu.baseline import FOLDER, PACKAGES, Missing
from benchmarks.gpu.environment import REPOSITORY, Run
from benchmarks.gpu.inputs import config, linears
from benchmarks.gpu.steps import MAX_SEQ_LEN, VARIANTS, supported
from vila_deploy.backends.native.compile_ahead import KernelSet, compile_ahead, compile_launches
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.kernels.gemv import gemv
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_linear import empty_like_packed
from vila_deploy.kernels.tile_config import TOKENS

TESTS = "tests/gpu/test_native_gpu.py"
# Kernels are checked by a stage of their own; what may hang is tested last of all.
NOT_BESIDE = "not every_kernel and not fused"
TEST_TIMEOUT_S = 40
# Of the cache, and of what is brought back of it.
MOST_CACHE_BYTES, MOST_PACKED_BYTES = 256 << 20, 16 << 20


def compile_kernels(run: Run) -> None:
    """Bring every kernel of every stage into Triton's cache, and say how many were there."""
    began = time.monotonic()
    count = compile_ahead(list(_kernel_sets(run)))
    count += compile_launches(_product_launches(run), run.capability)
    run.add(
        "compiled", "kernels", kernels=count.kernels, compiled=count.compiled, found=count.found,
        failed_helpers=count.failed_helpers, seconds=time.monotonic() - began,
        cache=str(_cache_folder()),
    )  # fmt: skip


def _kernel_sets(run: Run) -> Iterator[KernelSet]:
    modes = supported(run.capability)
    for model in run.models:
        for precision, modules in VARIANTS:
            sizes = config(model, precision, small=run.small)
            for mode in modes.values() if modules == ALL_FP16 else [modes["separate"]]:
                yield KernelSet(sizes, run.max_seq_len(MAX_SEQ_LEN), run.capability, modules, mode)


def _product_launches(run: Run) -> list[Launch]:
    """Return the products that are timed by themselves."""
    launches = []
    for model in run.models:
        for rows, columns in linears(config(model, "int4", small=run.small)).values():
            for bits, tokens in ((4, 1), (4, TOKENS), (8, 1), (16, 1)):
                weight = empty_like_packed(rows, columns, bits, 128, "meta")
                x, y = (torch.empty(tokens, n, dtype=torch.float16, device="meta")
                        for n in (columns, rows))  # fmt: skip
                launches.append(gemv(x, weight, None, y, run.capability))
    return launches


def prepare_baselines(run: Run) -> None:
    """Unpack and compile what others' kernels need; a row says what can't be."""
    for path in (PACKAGES / "humming" / "_native").rglob("nvrtc_compile"):
        path.chmod(0o755)  # a copy may have lost it
    with run.attempt("vllm"):
        try:
            baseline_vllm.unpacked()
        except Missing as error:
            run.add("skipped", "vllm", reason=str(error))
    if not (FOLDER / baseline_tinychat.SOURCES).exists():
        return
    if missing := [tool for tool in ("nvcc", "ninja", "g++") if shutil.which(tool) is None]:
        run.add("skipped", "tinychat int4", reason=f"not compiled without {', '.join(missing)}")
        return
    with run.attempt("tinychat"):
        baseline_tinychat.build()


def run_gpu_tests(run: Run) -> None:
    """Add a row with what pytest says of the engine on this GPU."""
    add_tests(run, NOT_BESIDE)


def add_tests(run: Run, chosen: str) -> None:
    """Run the GPU tests whose names `chosen` selects, as pytest's -k."""
    report = run.out.parent / f"junit-{run.stage}.xml"
    command = [
        sys.executable, "-m", "pytest", TESTS, "-q", "-p", "no:cacheprovider", "-k", chosen,
        f"--timeout={TEST_TIMEOUT_S}", "--timeout-method=thread", f"--junitxml={report}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n", flush=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    run.add("tests", chosen, exit_code=done.returncode, agrees=done.returncode == 0, **counts)


def pack_cache(run: Run) -> None:
    """Write Triton's cache beside the rows, so that the next machine finds it."""
    folder, path = _cache_folder(), run.out.parent / "cache.tar.xz"
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if not folder.is_dir() or size > MOST_CACHE_BYTES:
        run.add("skipped", "Triton's cache", reason=f"{size >> 20} MiB in {folder}")
        return
    with tarfile.open(path, "w:xz", preset=1) as packed:
        packed.add(folder, "cache")
    packed_bytes = path.stat().st_size
    if packed_bytes > MOST_PACKED_BYTES:
        path.unlink()
        run.add("skipped", "Triton's cache", reason=f"{packed_bytes >> 20} MiB when packed")
        return
    run.add("packed", "Triton's cache", bytes=size, packed_bytes=packed_bytes)


def _cache_folder() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or triton.knobs.cache.dir)
