"""Time engines of the CPU backend in turn, so that what else the computer does hits all alike.

$ python benchmarks/cpu_engine.py OLD NEW --rounds 3 >> benchmarks/results/cpu-engine.jsonl

Each round opens every engine once, in a process of its own. A JSON line for each engine has the
medians over the rounds, and each figure's ratio to the first engine's: the median of the ratios of
one round. Times on the wall hold on a quiet computer only; --cpu-time counts the processor time of
one thread instead, which others on the same cores change little. `load` is the number of processes
that wanted a core, at the start and the end. Decoding goes through caches that hold copies of
one token; `vision_s` is of one tile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vila_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from vila_deploy.bench.measure import commit, device_name, versions
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.runtime.open_engine import OpenedEngine, open_engine

PREFILL_TOKENS = 256
CONTEXTS = (0, 256, 512, 960)
DECODE_STEPS, PREFILLS = 16, 2
# Quick calls are repeated until so much time has passed.
LEAST_S = 0.3
CPU_TIME = "VILA_BENCHMARK_CPU_TIME"


def clock() -> float:
    """Return seconds on the wall, or of this process on a processor with --cpu-time."""
    return time.process_time() if CPU_TIME in os.environ else time.perf_counter()


def measure(folder: Path) -> dict[str, float]:
    """Return the figures of one engine, opened in this process."""
    start = clock()
    with open_engine(folder) as engine:
        figures = {"load_s": clock() - start, "loaded_bytes": resident_bytes()}
        figures |= _time(engine)
        figures["end_bytes"] = resident_bytes()
    return figures


def _time(engine: OpenedEngine) -> dict[str, float]:
    session = engine.session
    assert isinstance(session, OnnxRuntimeSession)
    embeds = session.embed_tokens(np.arange(PREFILL_TOKENS) % engine.model.vocab_size)

    def prefill() -> None:
        session.keep(0, 0)
        session.prefill(0, embeds)

    size = engine.model.tiling.tile or engine.model.image.size
    pixels = np.zeros((1, 3, size, size), np.float32)
    figures = {
        "vision_s": _seconds(lambda: session.encode_images(pixels), PREFILLS),
        f"prefill_{PREFILL_TOKENS}_s": _seconds(prefill, PREFILLS),
    }
    for buffer in session.rows.buffers:
        # Time does not depend on the values, but memory that was never written is not read.
        buffer[...] = buffer[:, :, :1]
    for context in CONTEXTS:
        if context + DECODE_STEPS <= session.max_seq_len:
            session.rows.lengths[0] = context
            figures[f"decode_{context}_ms"] = (
                _seconds(lambda: session.decode([0], [7]), DECODE_STEPS) * 1e3
            )
    return figures


def _seconds(call: Callable[[], object], times: int) -> float:
    """Return the median of at least `times` calls.

    The first call, which also makes room for its results, is left out.
    """
    call()
    seconds: list[float] = []
    while len(seconds) < times or sum(seconds) < LEAST_S:
        start = clock()
        call()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def resident_bytes() -> int:
    """Return this process' resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="measure one engine in this process")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread, for a busy computer"
    )
    options = parser.parse_args()
    if options.cpu_time:
        os.environ |= {CPU_TIME: "1", "OMP_NUM_THREADS": "1"}
    if options.one:
        print(json.dumps(measure(options.engines[0])))
        return
    load = [os.getloadavg()[0]]
    rounds = [
        {engine: _in_process(engine) for engine in options.engines} for _ in range(options.rounds)
    ]
    load.append(os.getloadavg()[0])
    for engine in options.engines:
        print(json.dumps(_row(engine, options.engines[0], rounds, load)))


def _in_process(engine: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(engine)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    print(engine, json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def _row(
    engine: Path, first: Path, rounds: list[dict[Path, dict[str, float]]], load: list[float]
) -> dict[str, Any]:
    manifest = load_manifest(engine)
    names = [name for name in rounds[0][engine] if name in rounds[0][first]]
    medians = {name: statistics.median(r[engine][name] for r in rounds) for name in names}
    ratios = {
        name: statistics.median(r[engine][name] / r[first][name] for r in rounds) for name in names
    }
    return {
        "what": "an engine of the CPU backend beside another",
        "model": manifest.name,
        "weights": manifest.weights,
        "precision": manifest.precision,
        "activations": manifest.activations,
        **manifest.module_precision.to_json(),
        **medians,
        "ratio_to_first": ratios,
        "rounds": len(rounds),
        "clock": "processor time" if CPU_TIME in os.environ else "wall",
        "threads": os.environ.get("OMP_NUM_THREADS", "all cores"),
        "load": load,
        "label": "measured",
        "device": device_name(),
        "versions": versions(manifest.versions),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
