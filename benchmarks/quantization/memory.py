"""What vila-quantize takes in memory, disk and time, beside what its --plan says.

$ python benchmarks/quantization/memory.py CHECKPOINT SCRATCH --group-size 64
$ python benchmarks/quantization/memory.py --shapes VILA1.5-13b SCRATCH --algorithm rtn
$ python benchmarks/quantization/memory.py --shapes VILA1.5-13b SCRATCH --tokens 1024 --stop 2

--shapes writes a checkpoint of a released model's true shapes with random weights first (26 GB for
VILA1.5-13b; --layers N for fewer decoder layers). --tokens calibrates on so much text of this
Python's help, without images and without the comparison at the end. --stop N ends the run once N
decoder layers are finished; what was not run is not in its figures. Everything is removed again.

Memory is what the process holds without mapped files (Linux), sampled from outside. `read_bytes`
and `written_bytes` are those that the disk really moved, so read with a cold cache. With --results
FILE the JSON line goes there too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from true_shapes import write_checkpoint

from vila_deploy.bench.conditions import commit, device_name, versions
from vila_deploy.checkpoint.presets import PRESETS, preset
from vila_deploy.quantize.options import ALGORITHMS
from vila_deploy.utils.host_memory import OWN_PAGES, SAMPLE_EVERY_S

PROGRAM = [str(Path(sys.executable).parent / "vila-quantize")]
CHARACTERS_PER_TOKEN = 4


@dataclasses.dataclass
class Watched:
    """A program while it runs, from outside."""

    peak_memory_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def look(self, process: int) -> None:
        """Takes a sample; a program that has ended gives none."""
        try:
            status = Path(f"/proc/{process}/status").read_text().splitlines()
            moved = Path(f"/proc/{process}/io").read_text().splitlines()
        except OSError:
            return
        own = 1024 * sum(int(line.split()[1]) for line in status if line.startswith(OWN_PAGES))
        self.peak_memory_bytes = max(self.peak_memory_bytes, own)
        counts = dict(line.split(": ") for line in moved)
        self.read_bytes = max(self.read_bytes, int(counts["read_bytes"]))
        self.written_bytes = max(self.written_bytes, int(counts["write_bytes"]))


def run(checkpoint: Path, scratch: Path, arguments: list[str], stop: int | None) -> dict[str, Any]:
    """Quantizes with these arguments and says what was planned and what was measured."""
    done = subprocess.run(
        [*PROGRAM, str(checkpoint), "--plan", "--json", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    planned = json.loads(done.stdout)
    out = scratch / "out"
    work, watched, layers = out.with_name(f"{out.name}.partial"), Watched(), 0
    resumable = ["--resume"] if stop else []
    start = time.monotonic()
    child = subprocess.Popen([*PROGRAM, str(checkpoint), "-o", str(out), *arguments, *resumable])
    while child.poll() is None:
        watched.look(child.pid)
        if stop:
            layers = max(layers, len(list(work.glob("layer-*-*.safetensors"))))
            if layers >= stop:
                child.send_signal(signal.SIGTERM)
        time.sleep(SAMPLE_EVERY_S)
    seconds = time.monotonic() - start
    row: dict[str, Any] = {
        "planned_bytes": planned["device_bytes"],
        "peak_memory_bytes": watched.peak_memory_bytes,
        "planned_output_bytes": planned["output_bytes"],
        "output_bytes": None,
        "planned_seconds": round(planned["seconds"], 1),
        "seconds": round(seconds, 1),
        "input_bytes": size(checkpoint),
        "read_bytes": watched.read_bytes,
        "written_bytes": watched.written_bytes,
        "layers_run": layers,
        "tokens": None,
    }
    if out.exists():
        row |= of_report(json.loads((out / "report.json").read_text("utf-8")))
    elif not (stop and layers >= stop):
        sys.exit(f"vila-quantize ended with exit code {child.returncode}")
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    return row


def of_report(report: dict[str, Any]) -> dict[str, Any]:
    """What a run that came to its end says itself."""
    calibration = report["calibration"] or {}
    return {
        "peak_memory_bytes": report["peak_memory_bytes"],
        "output_bytes": report["output_bytes"],
        "tokens": calibration.get("tokens"),
        "layers_run": len(report["layers"]),
    }


def size(folder: Path) -> int:
    """Bytes of all weights below it."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def text_of(tokens: int) -> str:
    """About so many tokens of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))[: tokens * CHARACTERS_PER_TOKEN]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("scratch", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--shapes", choices=PRESETS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default=ALGORITHMS[0])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if (options.checkpoint is None) == (options.shapes is None):
        parser.error("give either CHECKPOINT or --shapes")
    options.scratch.mkdir(parents=True)
    try:
        row = measure(options)
    finally:
        shutil.rmtree(options.scratch)
    print(json.dumps(row))
    if options.results:
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run as the command line asks for it."""
    checkpoint = options.checkpoint or options.scratch / "checkpoint"
    if options.shapes:
        config = preset(options.shapes, "fp16")
        count = options.layers or config.llm.num_layers
        llm = dataclasses.replace(config.llm, num_layers=count)
        write_checkpoint(checkpoint, dataclasses.replace(config, llm=llm))
    arguments = ["--algorithm", options.algorithm, "--group-size", str(options.group_size)]
    if options.tokens:
        text = options.scratch / "text.txt"
        text.write_text(text_of(options.tokens), "utf-8")
        arguments += ["--calib", str(text), "--text-only", "--no-eval"]
    row = {"shapes": options.shapes or checkpoint.name, "algorithm": options.algorithm}
    row |= {"group_size": options.group_size}
    row |= run(checkpoint, options.scratch, arguments, options.stop)
    row |= {"weights": "random" if options.shapes else "trained", "label": "measured"}
    return row | {"device": device_name(), "versions": versions(), "commit": commit()}


if __name__ == "__main__":
    main()
