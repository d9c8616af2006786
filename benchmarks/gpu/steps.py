"""Whole decoding steps as CUDA graphs: tokens per second, and each kernel's share of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.environment import Run, reason_of
from benchmarks.gpu.inputs import config, random_llm
from benchmarks.gpu.kernel_times import measure_kernels
from benchmarks.gpu.timing import seconds
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.weights import empty_llm
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.fused_layer import PHASES
from vila_deploy.kernels.launch_mode import LAUNCH_MODES, LaunchMode
from vila_deploy.utils.errors import VilaDeployError

CONTEXT, MAX_SEQ_LEN, STEPS, ROUNDS = 512, 1024, 64, 11
# Memory that a device must have beyond the weights: cache, activations, torch.
SPARE_BYTES = 3 << 30


# Of each model: precision of the layers, then of head and cache.
VARIANTS = (
    ("int4", ALL_FP16),
    ("int4", ModulePrecision(lm_head="int4")),
    ("int4", ModulePrecision(kv_cache="int8")),
    ("int4", ModulePrecision(lm_head="int4", kv_cache="int8")),
    ("fp16", ALL_FP16),
)
# Models whose launch modes are compared.
COMPARED = (("3B", "int4"), ("8B", "int4"), ("13B", "int4"), ("40B", "int4"), ("3B", "fp16"))
LEAST_S = 3.0  # for one of them


def measure_steps(run: Run) -> None:
    """Time every variant of each model; a model that doesn't fit is a row that says so."""
    for model in run.models:
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
    sizes = config(model, precision, small=run.small)
    max_seq_len = run.max_seq_len(MAX_SEQ_LEN)
    weight_bytes = empty_llm(sizes, max_seq_len, lm_head=module_precision.lm_head).bytes_per_step
    if not run.rehearsed and weight_bytes + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        run.add("failed", name, reason=f"{weight_bytes / 1e9:.1f} GB of weights don't fit")
        return
    llm = random_llm(sizes, max_seq_len, run.device, module_precision.lm_head)
    cache = random_cache(sizes, max_seq_len, run, module_precision.kv_cache)
    step = DecodeStep(StepConfig(sizes, max_seq_len, run.capability, run.device), llm, cache)
    context = 3 if run.small else CONTEXT
    cache_bytes = cache.bytes_per_token * (context + STEPS // 2)
    timed = timed_steps(run, step, cache, context)
    step_s = timed.seconds
    peak = 0 if run.rehearsed else torch.cuda.max_memory_allocated()
    total = weight_bytes + cache_bytes
    run.add(
        "step", name, weights="random", context=context, tokens_per_s=1 / step_s,
        milliseconds=step_s * 1e3, weight_bytes=weight_bytes, cache_bytes=cache_bytes,
        bytes=total, bytes_per_s=total / step_s, launches=len(step.launches),
        peak_memory_bytes=peak, **timed.repeated(),
    )  # fmt: skip
    if not run.rehearsed and module_precision == ALL_FP16:
        measure_kernels(run, name, step, cache, context)


def measure_launch_modes(run: Run) -> None:
    """Time the same step in every launch mode that the device has, but for fused layers.

    `same_bits` compares the logits of the first and of the last of STEPS replays with those of the
    first mode, `error` is the relative difference of the first's.
    """
    modes = {n: mode for n, mode in supported(run.capability).items() if not mode.fuse_layers}
    _compare(run, COMPARED, modes)


def measure_fused(run: Run) -> None:
    """Time steps with fused layers, whose programs wait for each other and might do so for ever.

    Then their test, last of all.
    """
    modes = {n: mode for n, mode in supported(run.capability).items() if mode.fuse_layers}
    _compare(run, COMPARED[:2], {"separate": LaunchMode(), **modes})
    if not run.small:
        from benchmarks.gpu.prepare import add_tests

        add_tests(run, "fused")


def _compare(
    run: Run, models: Sequence[tuple[str, str]], modes: Mapping[str, LaunchMode]
) -> None:  # fmt: skip
    for model, precision in models[:1] if run.small else models:
        if run.left_s < LEAST_S:
            run.add("skipped", f"{model} {precision}, launch modes", reason="no time left")
            continue
        with run.attempt(f"{model} {precision}, launch modes"):
            _measure_modes(run, model, precision, modes)


def _measure_modes(
    run: Run, model: str, precision: str, modes: Mapping[str, LaunchMode]
) -> None:  # fmt: skip
    name, sizes = f"{model} {precision}", config(model, precision, small=run.small)
    max_seq_len, context = (32, 3) if run.small else (MAX_SEQ_LEN, CONTEXT)
    if run.small:
        sizes = replace(sizes, num_layers=2)  # one layer has none to be fused with
    if not run.rehearsed:
        torch.cuda.empty_cache()
    weight_bytes = empty_llm(sizes, max_seq_len).bytes_per_step
    if not run.rehearsed and weight_bytes + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        run.add("failed", f"{name}, launch modes", reason="weights don't fit")
        return
    llm = random_llm(sizes, max_seq_len, run.device)
    cache = random_cache(sizes, max_seq_len, run, ALL_FP16.kv_cache)
    expected: Timed | None = None
    for shown, mode in modes.items():
        try:
            step_config = StepConfig(sizes, max_seq_len, run.capability, run.device, mode)
            step = DecodeStep(step_config, llm, cache)
            timed = timed_steps(run, step, cache, context)
        except Exception as error:  # the others are still wanted
            run.add("failed", f"{name}, {shown}", reason=reason_of(error))
            continue
        expected = expected or timed
        fused = [launch for launch in step.launches if launch.name == "fused_layer_kernel"]
        run.add(
            "launch_mode", f"{name}, {shown}", weights="random", context=context,
            tokens_per_s=1 / timed.seconds, milliseconds=timed.seconds * 1e3,
            launches=len(step.launches),
            grid_barriers=0 if run.rehearsed else len(fused) * (PHASES - 1),
            same_bits=torch.equal(timed.first, expected.first)
            and torch.equal(timed.last, expected.last),
            error=float((timed.first - expected.first).norm() / expected.first.norm()),
            **timed.repeated(),
        )  # fmt: skip


def supported(capability: ComputeCapability) -> dict[str, LaunchMode]:
    """Return the rows of LAUNCH_MODES that a device of this compute capability has."""
    modes = {}
    for name, mode in LAUNCH_MODES.items():
        try:
            mode.check(capability)
        except VilaDeployError:
            continue
        modes[name] = mode
    return modes


def random_cache(sizes: LlmConfig, max_seq_len: int, run: Run, dtype: str) -> Cache:
    """Return a cache of keys and values of standard deviation 1."""
    cache = Cache(sizes, max_seq_len, run.device, dtype)
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
    """Seconds of a step, and the logits of the first and the last replay of a round.

    `repeats`: whether all rounds left equal bytes; None where there was only one.
    """

    seconds: float
    first: torch.Tensor
    last: torch.Tensor
    repeats: bool | None = None

    def repeated(self) -> dict[str, Any]:
        """Return what a row says of it: a time of steps that differ is of no use."""
        found: dict[str, Any] = {"equal_bytes": self.repeats, "rounds": ROUNDS}
        return found | ({"agrees": False} if self.repeats is False else {})


def timed_steps(run: Run, step: DecodeStep, cache: Cache, context: int) -> Timed:
    """Time a step from `context` tokens on: median over rounds of STEPS replays of its graph."""

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
    # The logits of a replay: launched one by one, kernels hardly overlap.
    begin()
    graph.replay()
    first, times, outputs = step.logits.clone(), [], []
    for _ in range(ROUNDS):
        begin()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(STEPS):
            graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3 / STEPS)
        outputs.append(step.logits.clone())
    # The cache behind the context is rewritten with the same values: every round is the same.
    repeats = all(torch.equal(outputs[1], output) for output in outputs[1:])
    return Timed(statistics.median(times[1:]), first, outputs[-1], repeats)
