"""Whole decoding steps as CUDA graphs: tokens per second, and what each kernel takes of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.environment import Run, reason_of
from benchmarks.gpu.inputs import config, random_llm
from benchmarks.gpu.timing import seconds
from vila_deploy.backends.native.compile import engine_launches
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, Sizes
from vila_deploy.backends.native.weights import empty_llm
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.kernels.fused_layer import PHASES
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.pdl import Boundaries
from vila_deploy.utils.errors import VilaDeployError

CONTEXT, SLOTS, STEPS, ROUNDS = 512, 1024, 64, 11
# What a device must have beyond the weights: cache, activations, torch.
SPARE_BYTES = 3 << 30


# What is asked of each model: precision of the layers, then of head and cache.
VARIANTS = (
    ("int4", ALL_FP16),
    ("int4", ModulePrecision(lm_head="int4")),
    ("int4", ModulePrecision(kv_cache="int8")),
    ("int4", ModulePrecision(lm_head="int4", kv_cache="int8")),
    ("fp16", ALL_FP16),
)
# How kernels may follow each other, beside the way in which a Session's do; one that may hang last.
BOUNDARIES = {
    "as it is": Boundaries(),
    "attention merged": Boundaries(merge=True),
    "pdl": Boundaries(overlap=True),
    "pdl, attention merged": Boundaries(overlap=True, merge=True),
    "joined": Boundaries(join=True),
    "joined, attention merged": Boundaries(join=True, merge=True),
}
BOUNDED = (("3B", "int4"), ("8B", "int4"), ("13B", "int4"), ("40B", "int4"), ("3B", "fp16"))
LEAST_S = 40.0  # for the ways of one of them


def measure_steps(run: Run) -> None:
    """Every variant of each model; a model that doesn't fit is a row that says so."""
    for model in ("3B",) if run.rehearsed else ("3B", "8B", "13B", "40B"):
        for precision, module_precision in VARIANTS:
            name = ", ".join(filter(None, (f"{model} {precision}", module_precision.summary())))
            if run.left_s < LEAST_S:
                run.add("skipped", name, reason="no time left")
                continue
            with run.attempt(name):
                _measure(run, name, model, precision, module_precision)


def _measure(
    run: Run, name: str, model: str, precision: str, module_precision: ModulePrecision
) -> None:
    if not run.rehearsed:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sizes = config(model, precision, small=run.rehearsed)
    slots = 32 if run.rehearsed else SLOTS
    weight_bytes = empty_llm(sizes, slots, lm_head=module_precision.lm_head).bytes_per_step
    if not run.rehearsed and weight_bytes + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        run.add("failed", name, reason=f"{weight_bytes / 1e9:.1f} GB of weights don't fit")
        return
    llm = random_llm(sizes, slots, run.device, module_precision.lm_head)
    cache = random_cache(sizes, slots, run, module_precision.kv_cache)
    step = DecodeStep(Sizes(sizes, slots, run.sm, run.device), llm, cache)
    context = 3 if run.rehearsed else CONTEXT
    cache_bytes = cache.bytes_per_token * (context + STEPS // 2)
    step_s = timed_steps(run, step, cache, context).seconds
    peak = 0 if run.rehearsed else torch.cuda.max_memory_allocated()
    total = weight_bytes + cache_bytes
    run.add(
        "step", name, weights="random", context=context, tokens_per_s=1 / step_s,
        milliseconds=step_s * 1e3, weight_bytes=weight_bytes, cache_bytes=cache_bytes,
        bytes=total, bytes_per_s=total / step_s, launches=len(step.launches),
        peak_memory_bytes=peak,
    )  # fmt: skip
    if not run.rehearsed and module_precision == ALL_FP16:
        _kernels(run, name, step, cache, context)


def measure_boundaries(run: Run) -> None:
    """The same step with its kernels following each other in every way that the device has.

    `same_bits` compares the logits of the first and of the last of STEPS replays with those of the
    first way, `error` is the relative difference of the first's.
    """
    for model, precision in BOUNDED[:1] if run.rehearsed else BOUNDED:
        if run.left_s < LEAST_S:
            run.add("skipped", f"{model} {precision}, boundaries", reason="no time left")
            continue
        with run.attempt(f"{model} {precision}, boundaries"):
            _measure_boundaries(run, model, precision)


def _measure_boundaries(run: Run, model: str, precision: str) -> None:
    name, sizes = f"{model} {precision}", config(model, precision, small=run.rehearsed)
    slots, context = (32, 3) if run.rehearsed else (SLOTS, CONTEXT)
    if run.rehearsed:
        sizes = replace(sizes, num_layers=2)  # one layer has nobody to be joined with
    else:
        torch.cuda.empty_cache()
    weight_bytes = empty_llm(sizes, slots).bytes_per_step
    if not run.rehearsed and weight_bytes + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        run.add("failed", f"{name}, boundaries", reason="weights don't fit")
        return
    llm = random_llm(sizes, slots, run.device)
    cache = random_cache(sizes, slots, run, ALL_FP16.kv_cache)
    expected: Timed | None = None
    for shown, boundaries in supported(run.sm).items():
        try:
            about = Sizes(sizes, slots, run.sm, run.device, boundaries)
            step = DecodeStep(about, llm, cache)
            timed = timed_steps(run, step, cache, context)
        except Exception as error:  # the others are still wanted
            run.add("failed", f"{name}, {shown}", reason=reason_of(error))
            continue
        expected = expected or timed
        phases = [launch for launch in step.launches if launch.name == "joined_kernel"]
        run.add(
            "boundaries", f"{name}, {shown}", weights="random", context=context,
            tokens_per_s=1 / timed.seconds, milliseconds=timed.seconds * 1e3,
            launches=len(step.launches),
            meetings=0 if run.rehearsed else len(phases) * (PHASES - 1),
            same_bits=torch.equal(timed.first, expected.first)
            and torch.equal(timed.last, expected.last),
            error=float((timed.first - expected.first).norm() / expected.first.norm()),
        )  # fmt: skip


def supported(sm: int) -> dict[str, Boundaries]:
    """The rows of BOUNDARIES that a device of compute capability sm / 10 has."""
    found = {}
    for name, boundaries in BOUNDARIES.items():
        try:
            boundaries.check(sm)
        except VilaDeployError:
            continue
        found[name] = boundaries
    return found


def all_launches(model: str, precision: str, sm: int) -> list[Launch]:
    """What the stages of this file launch of a model at its true size, to be compiled ahead."""
    sizes = config(model, precision, small=False)
    ways = supported(sm).values()
    return [each for way in ways for each in engine_launches(sizes, SLOTS, sm, ALL_FP16, way)]


def random_cache(sizes: LlmConfig, slots: int, run: Run, dtype: str) -> Cache:
    """Keys and values of standard deviation 1, or levels of that size."""
    cache = Cache(sizes, slots, run.device, dtype)
    for tensor in (cache.keys, cache.values):
        if cache.scales is None:
            tensor.normal_()
        else:
            tensor.random_(-127, 128)
    if cache.scales is not None:
        cache.scales.fill_(1 / 74)
    return cache


@dataclass(frozen=True)
class Timed:
    """Seconds of a step, and the logits of the first and the last replay of a round."""

    seconds: float
    first: torch.Tensor
    last: torch.Tensor


def timed_steps(run: Run, step: DecodeStep, cache: Cache, context: int) -> Timed:
    """A step from `context` tokens on: the median over rounds of STEPS replays of its graph."""

    def begin() -> None:
        cache.position.fill_(context)
        step.token.fill_(1)

    begin()
    if run.rehearsed:
        step_s = seconds([step], run.device)
        return Timed(step_s, step.logits.clone(), step.logits.clone())
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # Of a replay: launched one by one, kernels hardly overlap.
    begin()
    graph.replay()
    first, found, outputs = step.logits.clone(), [], []
    for _ in range(ROUNDS):
        begin()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(STEPS):
            graph.replay()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after) / 1e3 / STEPS)
        outputs.append(step.logits.clone())
    # The cache behind the context is rewritten with the same values: every round is the same.
    repeats = all(torch.equal(outputs[1], other) for other in outputs[1:])
    run.add("check", f"{ROUNDS - 1} rounds of {STEPS} tokens, equal bytes", agrees=repeats)
    return Timed(statistics.median(found[1:]), first, outputs[-1])


def _kernels(run: Run, name: str, step: DecodeStep, cache: Cache, context: int) -> None:
    """Each kernel alone, once over all layers, so that the L2 holds none of the weights."""
    cache.position.fill_(context)
    by_name: dict[str, list[Callable[[], None]]] = {}
    for launch in step.launches:
        by_name.setdefault(launch.name, []).append(launch)
    for kernel, launches in by_name.items():
        if kernel == "pick_kernel":
            continue
        each = seconds(launches, run.device)
        run.add("kernel", f"{name} {kernel}", microseconds=each * 1e6, launches=len(launches))
    _boundary(run, step.launches[-1:])


def _boundary(run: Run, launches: Sequence[Callable[[], None]]) -> None:
    """What one more launch inside a graph costs, when it does next to nothing."""
    run.add("kernel", "boundary", microseconds=seconds(launches, run.device, repeats=64) * 1e6)
