"""Measure one engine in this process: time to first token, decoding, memory, bandwidth."""

from __future__ import annotations

import resource
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from vila_deploy.bench.bandwidth import read_bandwidth_bytes_per_s
from vila_deploy.bench.conditions import commit, device_name, versions
from vila_deploy.bench.first_token import check_room, measure_first_token, noise_image
from vila_deploy.bench.gpu import gpu_name
from vila_deploy.bench.several_sequences import measure_several
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import Session, choices_of
from vila_deploy.engine.target import get_target
from vila_deploy.runtime.generate import decode_tokens
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.arrays import Floats

DECODE_TOKENS = 256
# Not timed: a GPU's first steps record its graph.
WARM_UP_TOKENS = 4


def measure(folder: Path) -> dict[str, Any]:
    """Return one row of `vila-bench --json` for the engine in `folder`.

    Decoding: 256 greedy tokens, batch 1, after one image; the first 4 are not timed. Time to first
    token: median of up to five runs. Memory: the largest resident set of this process up to the end
    of decoding. Bandwidth: of this computer's memory, measured; on a GPU the published one. On a
    GPU also up to 8 sequences decoded together, where the engine holds several.
    """
    with open_engine(folder) as engine:
        target = get_target(engine.manifest.target)
        gpu = gpu_name(target, engine.manifest.backend)
        image = noise_image()
        check_room(engine, image, DECODE_TOKENS)
        if gpu:
            # The first time, kernels are compiled and libraries loaded.
            measure_first_token(engine, image, max_runs=1)
        first_token = measure_first_token(engine, image)
        decode_s = time_decoding(engine.session, first_token.logits, DECODE_TOKENS)[WARM_UP_TOKENS:]
        prompt_tokens = engine.session.length(0) - DECODE_TOKENS
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        choices = choices_of(engine.session)
    several = measure_several(folder, prompt_tokens) if gpu else None
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
        **({} if several is None else {"several_sequences": several}),
        **({"choices": choices} if choices else {}),
        "ttft_ms": first_token.medians_ms,
        "prompt_tokens": prompt_tokens,
        "peak_memory_bytes": peak_bytes,
        "weight_bytes_per_token": weight_bytes,
        "read_bandwidth_bytes_per_s": bandwidth,
        "bandwidth_label": "published" if gpu else "measured",
        "roofline_fraction": weight_bytes * tokens_per_s / bandwidth if bandwidth else None,
        "versions": versions(manifest.versions),
        "commit": commit(),
    }


def time_decoding(session: Session, logits: Floats, tokens: int) -> list[float]:
    """Return the seconds of each of `tokens` greedy steps as vila-chat gets them.

    No token ends the answer; slot 0 holds `tokens` more afterwards.
    """
    greedy = SamplingParams(max_new_tokens=tokens + 1)
    answer = decode_tokens(session, logits, (), greedy)
    times = [time.perf_counter() for _ in answer]
    return [later - earlier for earlier, later in pairwise(times)]
