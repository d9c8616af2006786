"""Time an engine of the CPU backend and llama.cpp in turn, on the same shapes and threads.

$ python benchmarks/cpu_llamacpp.py ENGINE MODEL.gguf LLAMA_BENCH --rounds 2 \\
    >> benchmarks/results/cpu-llamacpp.jsonl

MODEL.gguf has the engine's shapes in Q4_0 with a Q6_K head. A round runs the engine, llama-bench
without flash attention, the engine again, and llama-bench with flash attention, each in a process
of its own; with flash attention behind long contexts it is slower on a CPU, so that is left out.
A JSON line for each process; times on the wall, which mean something on a quiet computer only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vila_deploy.bench.measure import commit, device_name, versions
from vila_deploy.engine.manifest import read_manifest

CPU_ENGINE = Path(__file__).with_name("cpu_engine.py")
PREFILL_TOKENS, DECODE_TOKENS = 256, 8
# Contexts of decoding, by whether flash attention is on.
CONTEXTS = {False: (0, 256, 512, 960), True: (0, 256)}


def engine_row(folder: Path) -> dict[str, Any]:
    """Return the figures of the engine, measured in a process of its own."""
    command = [sys.executable, str(CPU_ENGINE), "--one", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    manifest = read_manifest(folder)
    return {
        "what": "vila-deploy",
        **json.loads(done.stdout),
        "model": manifest.name,
        "activations": manifest.activations,
        **manifest.module_precision.to_json(),
        "versions": versions(manifest.versions),
    }


def llama_row(bench: Path, model: Path, flash_attention: bool, threads: int) -> dict[str, Any]:
    """Return llama-bench's figures under the names of ours."""
    common = [
        bench,
        "-m",
        model,
        "-t",
        threads,
        "-fa",
        int(flash_attention),
        "-r",
        1,
        "-o",
        "jsonl",
    ]
    depths = ",".join(map(str, CONTEXTS[flash_attention]))
    tests = (["-p", PREFILL_TOKENS, "-n", 0], ["-p", 0, "-n", DECODE_TOKENS, "-d", depths])
    figures: dict[str, Any] = {}
    environment = {**os.environ, "LD_LIBRARY_PATH": str(bench.parent)}
    for test in tests:
        command = [str(word) for word in (*common, *test)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        for row in map(json.loads, done.stdout.splitlines()):
            if row["n_gen"]:
                figures[f"decode_{row['n_depth']}_ms"] = row["avg_ns"] / 1e6 / row["n_gen"]
            else:
                figures[f"prefill_{row['n_prompt']}_s"] = row["avg_ns"] / 1e9
            build = row["build_number"]
    return {
        "what": "llama.cpp",
        **figures,
        "model": "the same shapes, Q4_0 with a Q6_K head",
        "flash_attention": flash_attention,
        "versions": {"llama.cpp": f"b{build}"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("llama_bench", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    for _ in range(options.rounds):
        for flash_attention in (False, True):
            for row in (
                engine_row(options.engine),
                llama_row(options.llama_bench, options.model, flash_attention, threads),
            ):
                row |= {
                    "weights": "random",
                    "threads": threads,
                    "load": os.getloadavg()[0],
                    "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                    "label": "measured",
                    "device": device_name(),
                    "commit": commit(),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
