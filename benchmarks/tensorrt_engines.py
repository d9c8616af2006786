"""TensorRT engines of released models' true shapes with random weights: time, memory and size.

$ python benchmarks/tensorrt_engines.py VILA1.5-3b VILA1.5-3b-s2 --target rtx4090

Compiles each with tensorrt-rtx, which needs no GPU, into a folder that is removed afterwards.
Prints a JSON line for each, and adds it to benchmarks/results/tensorrt-engines.jsonl: seconds and
CPU seconds with Python's imports and the making of the weights, the most memory of all processes
together (own pages; and with mapped files), and the plans' bytes beside those of their weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vila_deploy.backends.registry import get_backend
from vila_deploy.bench.conditions import commit, device_name, versions
from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.checkpoint.presets import PRESETS, preset
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Manifest, load_manifest
from vila_deploy.engine.memory import MemoryRow
from vila_deploy.engine.target import get_target

OUTPUT = Path(__file__).parent / "results" / "tensorrt-engines.jsonl"
BUILD = """\
import sys
from pathlib import Path
from vila_deploy.builder.build import build_random_engine
build_random_engine(*sys.argv[1:4], Path(sys.argv[4]))
"""
SAMPLE_EVERY_S = 0.1


def build(model: str, precision: str, target: str, out: Path) -> dict[str, Any]:
    """Builds in a process of its own; its time, and its memory with that of its own processes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", BUILD, model, precision, target, str(out)])
    own = resident = 0
    while process.poll() is None:
        pages = [_pages(pid) for pid in _family(process.pid)]
        own = max(own, sum(anonymous for anonymous, _ in pages))
        resident = max(resident, sum(both for _, both in pages))
        time.sleep(SAMPLE_EVERY_S)
    if process.returncode:
        sys.exit(f"{model} for {target}: ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_own_bytes": own,
        "peak_resident_bytes": resident,
    }


def _family(pid: int) -> list[int]:
    """A process and those that it has started, and so on."""
    found = [pid]
    for each in found:
        for children in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, children.read_text("ascii").split())
            except OSError:  # it has just ended
                continue
    return found


def _pages(pid: int) -> tuple[int, int]:
    """Bytes of a process that are its own, and of all that it has in memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return 0, 0
    held = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    own = 1024 * (int(held.get("RssAnon", 0)) + int(held.get("RssShmem", 0)))
    return own, own + 1024 * int(held.get("RssFile", 0))


def sizes(out: Path, manifest: Manifest, model: str, precision: str) -> dict[str, Any]:
    """Bytes of plans and weights; the embedding table is a file beside them."""
    request = BuildRequest(get_target(manifest.target), manifest.limits)
    backend = get_backend(manifest.backend)
    items = plan_engine(preset(model, precision), backend, precision, request).items
    eye = sum(items[row].bytes for row in (MemoryRow.VISION, MemoryRow.PROJECTOR))
    weights = {"vision": eye, "llm": manifest.weight_bytes_per_token}
    plans = {part: (out / part / "model.plan").stat().st_size for part in weights}
    return {
        "plan_bytes": plans,
        "weight_bytes": weights,
        "plan_over_weights": round(sum(plans.values()) / sum(weights.values()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", choices=sorted(PRESETS), metavar="MODEL")
    parser.add_argument("--target", default="rtx4090")
    parser.add_argument("--precision", choices=["int4", "fp16"], default="int4")
    parser.add_argument("--scratch", type=Path, help="folder with room for the engine")
    args = parser.parse_args()
    for model in args.models:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            out = Path(scratch) / "engine"
            cost = build(model, args.precision, args.target, out)
            manifest = load_manifest(out)
            row = {
                "what": "engines compiled by tensorrt-rtx without a GPU",
                "model": model,
                "target": args.target,
                "precision": args.precision,
                "weights": "random",
                **cost,
                **sizes(out, manifest, model, args.precision),
                "label": "measured",
                "device": device_name(),
                "versions": {**versions(), **manifest.versions},
                "commit": commit(),
            }
        line = json.dumps(row)
        with OUTPUT.open("a", encoding="utf-8") as results:
            results.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
