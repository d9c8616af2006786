"""`python -m benchmarks.cpu_baselines`: other programs beside a CPU engine, in turn with it.

llama.cpp whole, OpenVINO and PyTorch's int4 operator on the products of a step alone. Each has an
environment of its own, made once. A JSON line a figure; what can't run is a line with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu_baselines import llamacpp, products
from benchmarks.cpu_baselines.environments import Unavailable
from benchmarks.cpu_baselines.random_gguf import write_random_gguf
from vila_deploy.bench.bandwidth import BandwidthReadings
from vila_deploy.bench.conditions import commit, device_name, versions
from vila_deploy.bench.host_load import is_noisy, load_before
from vila_deploy.builder.build import build_random_engine
from vila_deploy.engine.manifest import read_manifest
from vila_deploy.utils.errors import VilaDeployError

CPU_ENGINE = Path(__file__).resolve().parents[1] / "cpu_engine.py"
# Of decoding, by whether flash attention is on: with it, long contexts are slower on a CPU (79 ms
# instead of 61 at 512 tokens, 92 instead of 64 at 960), and the better setting counts.
CONTEXTS = {False: (0, 256, 512, 960), True: (0, 256)}
PRECISIONS = ("int4", "fp16")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_baselines", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="VILA1.5-3b", help="whose shapes")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", dest="precisions")
    parser.add_argument("--engine", type=Path, help="of these shapes, int4; else one is built")
    parser.add_argument("--gguf", type=Path, help="of these shapes, Q4_0; else one is written")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=("engine", "products"))
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="for engines in use")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        for row in _rows(options, Path(scratch)):
            print(json.dumps(row), flush=True)


def _rows(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    if options.only != "products":
        for precision in options.precisions or PRECISIONS[:1]:
            yield from _engine_rows(options, precision, scratch)
    if options.only != "engine":
        _say("products of a step: vila-deploy, PyTorch, OpenVINO")
        before = _state_before()
        for row in products.product_rows(options.model, scratch, products.OTHERS):
            yield _complete(row, before)


def _engine_rows(options: argparse.Namespace, precision: str, scratch: Path) -> Iterator[Row]:
    """Yield rows of the engine and of llama.cpp in turn."""
    shapes = {"model": options.model, "precision": precision}
    try:
        _say("llama.cpp: compiled the first time, which takes minutes")
        bench = llamacpp.find_llama_bench()
        engine = options.engine if precision == "int4" else None
        if engine is None:
            _say(f"building an engine of {options.model}, {precision}")
            engine = scratch / f"engine-{precision}"
            build_random_engine(options.model, precision, "cpu", engine)
        model = options.gguf if precision == "int4" else None
        if model is None:
            _say("writing the GGUF file")
            model = write_random_gguf(scratch, options.model, precision)
        for number in range(1, options.rounds + 1):
            for flash_attention in (False, True):
                about = {**shapes, "round": number}
                _say(f"{precision}, round {number}: vila-deploy")
                before = _state_before()
                yield _complete(_ours(engine, precision), before) | about
                _say(f"{precision}, round {number}: llama.cpp")
                before = _state_before()
                contexts = CONTEXTS[flash_attention]
                found = llamacpp.llama_rows(bench, model, precision, contexts, flash_attention)
                yield _complete(found, before) | about
        if options.gguf is None:
            model.unlink()
    except (Unavailable, VilaDeployError, OSError) as error:
        yield {"what": llamacpp.NAME, **shapes, "label": "skipped", "reason": str(error)}


def _ours(engine: Path, precision: str) -> Row:
    """Return the figures of the engine, measured in a process of its own."""
    command: Sequence[str] = [sys.executable, str(CPU_ENGINE), "--one", str(engine)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"the engine: {done.stderr.strip().splitlines()[-1]}")
    manifest = read_manifest(engine)
    return {
        "what": "vila-deploy",
        **json.loads(done.stdout),
        "stored_as": precision,
        "activations": manifest.activations,
        **manifest.module_precision.to_json(),
        "versions": versions(manifest.versions),
    }


def _state_before() -> Row:
    """Return what others take of the cores, and how fast this computer reads memory, just now."""
    others, readings = load_before(), BandwidthReadings()
    readings.read()
    return {
        "others_before_cores": others,
        "read_bandwidth_bytes_per_s": readings.median(),
        "noisy": is_noisy(others),
    }


def _complete(row: Row, before: Row) -> Row:
    """Return `row` with when and where it was measured, and `_state_before` of it."""
    about = {
        "weights": "random",
        "threads": len(os.sched_getaffinity(0)),
        **before,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "label": "measured",
        "device": device_name(),
        "commit": commit(),
    }
    return {**about, **row}


def _say(text: str) -> None:
    print(f"baselines: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
