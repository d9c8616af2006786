"""Measure one engine in this process: time to first token, decoding, memory, bandwidth."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from vila_deploy.bench.bandwidth import read_bandwidth_bytes_per_s
from vila_deploy.bench.gpu import gpu_name
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.target import get_target
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.images import Pixels, preprocess
from vila_deploy.processing.multimodal_prompt import (
    merge_embeddings,
    prompt_length,
    text_chunks,
)
from vila_deploy.runtime.conversation import encode_images, place_images
from vila_deploy.runtime.generate import decode_tokens
from vila_deploy.runtime.open_engine import OpenedEngine, open_engine
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.version import __version__

DECODE_TOKENS = 256
# Not timed: a GPU's first steps record its graph.
WARM_UP_TOKENS = 4
QUESTION = "Describe the picture."  # as in all recorded results
# A model with random weights has no tokenizer: the text before and behind the image as token ids.
UNTOKENIZED_CHUNKS = ([1] * 40, [1] * 20)
REPEAT_UNTIL_S, MAX_REPEATS = 3.0, 5
Result = TypeVar("Result")


def measure(folder: Path) -> dict[str, Any]:
    """Return one row of `vila-bench --json` for the engine in `folder`.

    Decoding: 256 greedy tokens, batch 1, after one image; the first 4 are not timed. Time to first
    token: median of up to five runs. Memory: the largest resident set of this process up to the end
    of decoding. Bandwidth: of this computer's memory, measured; on a GPU the published one.
    """
    with open_engine(folder) as engine:
        target = get_target(engine.manifest.target)
        gpu = gpu_name(target, engine.manifest.backend)
        image = noise_image()
        _check_room(engine, image)
        if gpu:
            # The first time, kernels are compiled and libraries loaded.
            _time_first_token(engine, image)
        ttft_ms, logits = _median_first_token(engine, image)
        decode_s = _time_decoding(engine, logits)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    manifest = engine.manifest
    weight_bytes = manifest.weight_bytes_per_token
    if gpu is None:
        bandwidth: float | None = read_bandwidth_bytes_per_s(weight_bytes)
    else:
        bandwidth = target.bandwidth_bytes_per_s
    tokens_per_s = len(decode_s) / sum(decode_s)
    return {
        "label": "measured",
        "model": manifest.name,
        "precision": manifest.precision,
        "target": manifest.target,
        "backend": manifest.backend,
        "device": gpu or device_name(),
        **({"host": device_name()} if gpu else {}),
        "weights": manifest.weights,
        "decode_tokens_per_s": tokens_per_s,
        "decode_ms_median": statistics.median(decode_s) * 1e3,
        "ttft_ms": ttft_ms,
        "prompt_tokens": engine.session.length(0) - DECODE_TOKENS,
        "peak_memory_bytes": peak_bytes,
        "weight_bytes_per_token": weight_bytes,
        "read_bandwidth_bytes_per_s": bandwidth,
        "bandwidth_label": "published" if gpu else "measured",
        "roofline_fraction": weight_bytes * tokens_per_s / bandwidth if bandwidth else None,
        "versions": versions(manifest.versions),
        "commit": commit(),
    }


def noise_image() -> Image.Image:
    """Return a landscape image of 640 × 480 random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))


def _check_room(engine: OpenedEngine, image: Image.Image) -> None:
    chunks, pixels = _prompt(engine, image)
    image_tokens = [count for one in pixels for count in engine.model.image_tokens(one)]
    needed = prompt_length(chunks, image_tokens) + DECODE_TOKENS
    if needed > engine.session.max_seq_len:
        raise VilaDeployError(
            f"the benchmark needs {needed} positions, this engine has {engine.session.max_seq_len}",
            fix=f"build it with --max-seq-len {needed} or more",
        )


def _prompt(engine: OpenedEngine, image: Image.Image) -> tuple[list[list[int]], list[Pixels]]:
    """Return the text chunks of a question about `image`, and its pixels."""
    template, end = PROMPT_TEMPLATES[engine.model.prompt], engine.model.image_end
    question, pixels = place_images(QUESTION, [image], engine.model)
    if engine.tokenizer is not None:
        return text_chunks(engine.tokenizer, render(template, [], question), end), pixels
    first, last = UNTOKENIZED_CHUNKS
    between: list[list[int]] = [[] for _ in engine.model.image_tokens(pixels[0])[1:]]
    return [list(first), *between, list(last)], pixels


def _median_first_token(
    engine: OpenedEngine, image: Image.Image
) -> tuple[dict[str, float], Floats]:
    """Return median milliseconds of preprocessing, vision, prefill and total; the last logits."""
    runs: list[dict[str, float]] = []
    start = time.perf_counter()
    while not runs or (len(runs) < MAX_REPEATS and time.perf_counter() - start < REPEAT_UNTIL_S):
        run, logits = _time_first_token(engine, image)
        runs.append(run)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return medians | {"total": sum(medians.values())}, logits


def _time_first_token(engine: OpenedEngine, image: Image.Image) -> tuple[dict[str, float], Floats]:
    """Return milliseconds of preprocessing, vision and prefill of a question; the last logits."""
    session, (chunks, _) = engine.session, _prompt(engine, image)
    session.keep(0, 0)
    preprocess_ms, pixels = _timed_ms(
        lambda: preprocess([image], engine.model.image, engine.model.tiling)
    )
    vision_ms, features = _timed_ms(lambda: encode_images(session, pixels))
    prefill_ms, logits = _timed_ms(
        lambda: session.prefill(0, merge_embeddings(chunks, features, session.embed_tokens))
    )
    return {"preprocess": preprocess_ms, "vision": vision_ms, "prefill": prefill_ms}, logits


def _timed_ms(call: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def _time_decoding(engine: OpenedEngine, logits: Floats) -> list[float]:
    """Return seconds between greedy tokens as vila-chat gets them; no token ends the answer."""
    greedy = SamplingParams(max_new_tokens=DECODE_TOKENS + 1)
    tokens = decode_tokens(engine.session, logits, (), greedy)
    times = [time.perf_counter() for _ in tokens]
    return [later - earlier for earlier, later in pairwise(times)][WARM_UP_TOKENS:]


def device_name() -> str:
    """Return processor, usable cores and current clock: `AMD EPYC (2 cores, 3100 MHz)`."""
    facts = {"model name": platform.machine(), "cpu MHz": "?"}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in facts:
                facts[key.strip()] = value.strip()
    cores = len(os.sched_getaffinity(0))
    return f"{facts['model name']} ({cores} cores, {facts['cpu MHz'].partition('.')[0]} MHz)"


def versions(built_with: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the versions installed here, and those of `built_with` that are not.

    Args:
        built_with: a manifest's versions, by package.
    """
    built_with = built_with or {}
    installed = {"vila-deploy": __version__, "python": platform.python_version()}
    for name in ("onnxruntime", "numpy", *built_with):
        # A board has no onnxruntime.
        with suppress(PackageNotFoundError):
            installed.setdefault(name, version(name))
    missing = {name: built_with[name] for name in built_with if name not in installed}
    return {**installed, **missing}


def commit() -> str | None:
    """Return the commit of this source tree; None if the package is installed without it."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
