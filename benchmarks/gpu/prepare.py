"""Before anything is timed: kernels and baselines are compiled, the engine is tested."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch

from benchmarks.gpu import baseline_tinychat, baseline_vllm, memory_limit
from benchmarks.gpu.baseline import FOLDER, PACKAGES, Missing
from benchmarks.gpu.environment import REPOSITORY, Run
from benchmarks.gpu.folders import triton_cache
from benchmarks.gpu.inputs import config, linears
from benchmarks.gpu.kernel_times import empty_launches
from benchmarks.gpu.steps import MAX_SEQ_LEN, VARIANTS, supported
from vila_deploy.backends.native.compile_ahead import KernelSet, compile_ahead, compile_launches
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.weights import empty_llm
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.kernels.gemv import gemv
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_linear import empty_like_packed
from vila_deploy.kernels.tile_config import TOKENS

TESTS = "tests/gpu/test_native_gpu.py"
# Kernels are checked by a stage of their own; what may hang is tested last of all.
NOT_BESIDE = "not every_kernel and not fused"
TEST_TIMEOUT_S = 40
TEST_PACKAGES = ("pytest", "pytest_timeout")


def compile_kernels(run: Run) -> None:
    """Bring every kernel of every stage into Triton's cache, and say how many were there."""
    began = time.monotonic()
    count = compile_ahead(list(_kernel_sets(run)))
    launches = [*_product_launches(run), *_lookup_launches(run), *empty_launches(run, "meta")]
    count += compile_launches(launches, run.capability)
    run.add(
        "compiled", "kernels", kernels=count.kernels, compiled=count.compiled, found=count.found,
        failed_helpers=count.failed_helpers, seconds=time.monotonic() - began,
        cache=str(triton_cache()),
    )  # fmt: skip


def _kernel_sets(run: Run) -> Iterator[KernelSet]:
    modes = supported(run.capability)
    for model in run.models:
        for precision, modules in VARIANTS:
            sizes = config(model, precision, small=run.small)
            sizes = replace(sizes, num_layers=max(sizes.num_layers, 2))  # as launch modes need
            for mode in modes.values() if modules == ALL_FP16 else [modes["separate"]]:
                yield KernelSet(sizes, run.max_seq_len(MAX_SEQ_LEN), run.capability, modules, mode)
    limited, modules = memory_limit.MODEL, ModulePrecision(lm_head=memory_limit.LM_HEAD)
    sizes = config(limited, "int4", small=run.small)
    yield KernelSet(sizes, memory_limit.longest(run), run.capability, modules)


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


def _lookup_launches(run: Run) -> list[Launch]:
    """Return a step over several tokens, which no engine has."""
    sizes, max_seq_len = config("3B", "int4", small=run.small), run.max_seq_len(MAX_SEQ_LEN)
    sizes = replace(sizes, num_layers=1)
    step_config = StepConfig(sizes, max_seq_len, run.capability, "meta")
    cache = Cache(sizes, max_seq_len, "meta")
    return list(DecodeStep(step_config, empty_llm(sizes, max_seq_len), cache, TOKENS).launches)


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
    if missing := [name for name in TEST_PACKAGES if find_spec(name) is None]:
        run.add("skipped", chosen, reason=f"no tests without {', '.join(missing)}")
        return
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
