"""40B on a GPU of 24 GB: an image, a prompt and tokens within 22.5 GiB of device memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import MODELS, config, random_llm
from benchmarks.gpu.steps import STEPS, timed_steps
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.offload import stream_layers
from vila_deploy.backends.native.prompts import Prompts
from vila_deploy.backends.native.tower import SCALE, load_encoder
from vila_deploy.backends.native.weights import empty_llm
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.presets import preset
from vila_deploy.checkpoint.tensor_schema import projector_tensor_specs, tower_tensor_specs
from vila_deploy.formats.module_dtypes import FP16, INT8, is_tower_linear

MODEL, LM_HEAD, MAX_SEQ_LEN = "40B", "int4", 2048
Result = TypeVar("Result")
LIMIT_BYTES = int(22.5 * 2**30)
CALLS = 3  # of an image and of a prompt
# Of a new CUDA context and the driver, which torch's own limit doesn't see.
CONTEXT_BYTES = 800 << 20


def measure_memory_limit(run: Run) -> None:
    """Add one row; torch is kept from taking more than the limit, so what runs has room."""
    name, before = f"{MODEL} int4, lm-head {LM_HEAD}, table and tower in host memory", 0
    if not run.rehearsed:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        before = total - free  # of this context, which CONTEXT_BYTES stands for, and of others
        allowed = LIMIT_BYTES - CONTEXT_BYTES
        if total > allowed:
            torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        figures = _measure(run)
    except torch.OutOfMemoryError as error:
        run.add("failed", name, reason=str(error).splitlines()[0][:200])
        return
    finally:
        if not run.rehearsed:
            torch.cuda.set_per_process_memory_fraction(1.0)
    # torch's peak, and what modules and graphs take beside it as the device counts.
    peak = None
    if not run.rehearsed:
        free, total = torch.cuda.mem_get_info()
        beside = total - free - before - torch.cuda.memory_reserved()
        peak = torch.cuda.max_memory_reserved() + max(beside, 0) + CONTEXT_BYTES
    run.add(
        "memory_limit", name, weights="random", limit_bytes=LIMIT_BYTES, peak_memory_bytes=peak,
        fits=peak and peak <= LIMIT_BYTES, **figures,
    )  # fmt: skip


def longest(run: Run) -> int:
    """Return how many tokens the cache holds."""
    return 96 if run.small else MAX_SEQ_LEN


def _measure(run: Run) -> dict[str, float]:
    vila = _vila(run)
    max_seq_len = longest(run)
    prompt = 30 if run.small else max_seq_len - 2 * STEPS
    llm = random_llm(vila.llm, max_seq_len, run.device, LM_HEAD, table_in_host=True)
    cache = Cache(vila.llm, max_seq_len, run.device)
    step_config = StepConfig(vila.llm, max_seq_len, run.capability, run.device)
    step = DecodeStep(step_config, llm, cache)
    image_s, features = _image(run, vila, FP16)
    small_s, _ = _image(run, vila, INT8)
    embeds = torch.randn(prompt, vila.llm.hidden_size, device=run.device)
    embeds[: len(features)] = features[:prompt].float()
    prompts = Prompts(step_config, llm, cache, step)
    if not run.rehearsed:
        prompts.capture()
    prompts.append(embeds, 0)
    prefill_s, _ = timed(run, lambda: prompts.append(embeds, 0))
    step_s = timed_steps(run, step, cache, prompt).seconds
    weight_bytes = empty_llm(vila.llm, max_seq_len, lm_head=LM_HEAD).bytes_per_step
    return {
        "image_ms": image_s * 1e3,
        "image_int8_ms": small_s * 1e3,
        "prompt_tokens": prompt,
        "prefill_ms": prefill_s * 1e3,
        "context": prompt,
        "tokens_per_s": 1 / step_s,
        "weight_bytes": weight_bytes,
    }


def timed(run: Run, call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the median seconds of three calls, and what the last returned."""
    wait: Callable[[], None] = (lambda: None) if run.rehearsed else torch.cuda.synchronize
    times = []
    for _ in range(1 if run.small else CALLS):
        wait()
        start = time.perf_counter()
        result = call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def _vila(run: Run) -> VilaConfig:
    full = preset(MODELS[MODEL], "int4")
    return small_vila(full, config(MODEL, "int4", small=True)) if run.small else full


def small_vila(full: VilaConfig, llm: LlmConfig) -> VilaConfig:
    """Return `full` with a tiny tower and the given decoder."""
    vision = replace(
        full.vision, hidden_size=64, num_layers=5, num_heads=2, intermediate_size=128,
        image_size=56,
    )  # fmt: skip
    tiling = replace(full.tiling, tile=56, scales=(56,))
    return replace(
        full, llm=llm, vision=vision, tiling=tiling,
        image=replace(full.image, size=56),
    )  # fmt: skip


def _image(run: Run, vila: VilaConfig, dtype: str) -> tuple[float, Tensor]:
    """Return seconds of an image through a streamed tower, and its features [tokens, hidden]."""
    kind = torch.float32 if run.rehearsed else torch.float16
    encoder = stream_layers(load_encoder(vision_tensors(vila, dtype), vila, kind), run.device)
    size = vila.vision.image_size
    pixels = torch.randn(1, 3, size, size, dtype=kind, device=run.device)
    encoder(pixels)  # compiles nothing, but brings cuBLAS
    return timed(run, lambda: encoder(pixels)[0])


def vision_tensors(vila: VilaConfig, dtype: str) -> dict[str, Tensor]:
    """Return random tensors of tower and projector; those of one shape are the same numbers."""
    known: dict[tuple[bool, tuple[int, ...]], Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for tensor in (*tower_tensor_specs(vila), *projector_tensor_specs(vila)):
        name, shape = tensor.name, tensor.shape
        scale = 1 / math.sqrt(math.prod(shape[1:]) or 1)
        small = dtype == INT8 and is_tower_linear(name, shape)
        if small:
            tensors[name + SCALE] = torch.full(shape[:1], scale / 74, dtype=torch.float16)
        if (small, shape) not in known:
            known[small, shape] = (
                torch.randint(-127, 128, shape, dtype=torch.int8)
                if small
                else torch.randn(shape).mul_(scale).half()
            )
        tensors[name] = known[small, shape]
    return tensors
