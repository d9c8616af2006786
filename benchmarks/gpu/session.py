"""What a user gets: an image, a prompt, tokens one by one, through the engine's own session."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import MODELS, config, random_llm
from benchmarks.gpu.memory_limit import small_vila, vision_tensors
from benchmarks.gpu.rows import best_mode
from vila_deploy.backends.native.decode_step import StepConfig
from vila_deploy.backends.native.loading import vision_dtype
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.backends.native.tower import load_encoder
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.kernels.launch_mode import LAUNCH_MODES

COMPARED, PROMPT, NEW_TOKENS, MAX_SEQ_LEN = ("3B", "8B"), 512, 128, 1024
LEAST_S = 5.0
ANSWERS = {
    "greedy": SamplingParams(NEW_TOKENS),
    "sampled": SamplingParams(NEW_TOKENS, temperature=0.7, top_p=0.9, seed=1),
}


def measure_sessions(run: Run) -> None:
    """Add rows of 3B and 8B with random weights, in the launch mode that this run found best."""
    for model in COMPARED[:1] if run.small else COMPARED:
        if run.left_s < LEAST_S:
            run.add("skipped", f"{model}, session", reason="no time left")
            continue
        with run.attempt(f"{model}, session"):
            _measure(run, model)


def _measure(run: Run, model: str) -> None:
    vila = _vila(run, model)
    mode = best_mode(run.rows, model)
    sizes = StepConfig(
        vila.llm, run.max_seq_len(MAX_SEQ_LEN), run.capability, run.device, LAUNCH_MODES[mode]
    )
    llm = random_llm(vila.llm, sizes.max_seq_len, run.device)
    encoder = load_encoder(vision_tensors(vila, FP16), vila, vision_dtype(run.device))
    opened_s, session = timed_call(
        lambda: NativeSession.of_parts(sizes, llm, encoder.to(run.device), ALL_FP16)
    )
    size = vila.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    session.encode_images(pixels)
    image_s, _ = timed_call(lambda: session.encode_images(pixels))
    prompt, tokens = (6, 3) if run.small else (PROMPT, NEW_TOKENS)
    embeds = np.random.default_rng(1).standard_normal((prompt, vila.llm.hidden_size), np.float32)
    for name, sampling in ANSWERS.items():
        figures = answer(session, embeds, replace(sampling, max_new_tokens=tokens))
        run.add(
            "session", f"{model} int4, {name}", weights="random", launch_mode=mode,
            prompt_tokens=prompt, open_ms=opened_s * 1e3, image_ms=image_s * 1e3, **figures,
        )  # fmt: skip
    session.close()


def answer(session: NativeSession, embeds: np.ndarray, sampling: SamplingParams) -> dict[str, Any]:
    """Return milliseconds to the first token, and tokens a second behind it, of a second answer."""
    for _ in range(2):
        session.truncate(0)
        start = time.perf_counter()
        session.prefill(embeds)
        stream = session.stream((), sampling)
        next(stream)
        first = time.perf_counter()
        count = sum(1 for _ in stream)
        end = time.perf_counter()
    return {
        "first_token_ms": (first - start) * 1e3,
        "tokens": count + 1,
        "tokens_per_s": count / (end - first),
    }


def timed_call(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _vila(run: Run, model: str) -> VilaConfig:
    full = preset(MODELS[model], "int4")
    return small_vila(full, config(model, "int4", small=True)) if run.small else full
