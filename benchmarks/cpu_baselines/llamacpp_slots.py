"""Several sequences at once: backend llamacpp beside llama-batched-bench, on one file, in turns.

$ vila-build-engine CHECKPOINT --target cpu --backend llamacpp -o engine
$ python -m benchmarks.cpu_baselines.llamacpp_slots engine/llm/model.gguf --results FILE

Each round times a few steps of every attention of ours, then llama-batched-bench with the same
number of sequences, tokens and threads, and with the attention that it takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_baselines.llamacpp import find_llama_bench, run_tool
from vila_deploy.backends.llamacpp.decoder import DecoderOptions, LlamaDecoder, LlamaModel
from vila_deploy.bench.measure import commit, device_name

BATCHED_BENCH = "llama-batched-bench"
PROMPT_TOKENS, STEPS, POSITIONS = 2, 12, 256


def steps_per_second(model: LlamaModel, options: DecoderOptions, flash_attention: bool) -> float:
    """Return the tokens a second of all sequences together; the median step counts."""
    decoder = LlamaDecoder(model, options, flash_attention)
    slots, seconds = range(options.slots), []
    for token in range(PROMPT_TOKENS + STEPS):
        begin = time.perf_counter()
        decoder.decode(slots, [1000 * slot + token for slot in slots])
        seconds.append(time.perf_counter() - begin)
    decoder.close()
    return options.slots / float(np.median(seconds[PROMPT_TOKENS:]))


def rows(file: Path, bench: Path, slots: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each round and program."""
    threads = len(os.sched_getaffinity(0))
    options = DecoderOptions(slots, POSITIONS, int8_cache=False, threads=threads)
    common = [
        "-m", file, "-c", slots * POSITIONS, "-b", POSITIONS, "-ub", POSITIONS, "-npp",
        PROMPT_TOKENS, "-ntg", STEPS, "-npl", slots, "-t", threads, "--output-format", "jsonl",
    ]  # fmt: skip
    for number in range(rounds):
        model = LlamaModel(file, options)
        for attention in ("flash", "plain"):
            speed = steps_per_second(model, options, attention == "flash")
            row = {"what": "vila-deploy", "attention": attention, "tokens_per_s": speed}
            yield row | {"round": number}
        model.close()
        (found,) = run_tool(bench, common)
        yield {"what": BATCHED_BENCH, "tokens_per_s": found["speed_tg"], "round": number}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="llm/model.gguf of an engine")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="what the rows call it")
    parser.add_argument("--results", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    found = shutil.which(BATCHED_BENCH)
    bench = Path(found).resolve() if found else find_llama_bench().with_name(BATCHED_BENCH)
    facts = {"model": args.model or args.file.name, "slots": args.slots, "label": "measured"}
    facts |= {"device": device_name(), "commit": commit()}
    for row in rows(args.file, bench, args.slots, args.rounds):
        line = json.dumps(facts | row)
        print(line, flush=True)
        if args.results is not None:
            with args.results.open("a", encoding="utf-8") as results:
                results.write(line + "\n")


if __name__ == "__main__":
    main()
