"""vila-quantize on the GPU: the CPU's result, and seconds a layer at 3B's shapes."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.environment import REPOSITORY, Run
from benchmarks.gpu.inputs import MODELS
from benchmarks.true_shapes import write_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.pipeline import quantize

TINY_VILA = REPOSITORY / "examples" / "tiny-vila" / "checkpoint"
# Mean KL of two roundings of the same quality; they differ in single quantized values.
RATIO = 1.3
LAYERS = (1, 3)  # decoder layers of the two checkpoints that are timed


def measure_quantize(run: Run) -> None:
    """Quantize tiny-vila on this device and on the CPU, then one layer of 3B's shapes."""
    with torch.inference_mode(False), tempfile.TemporaryDirectory() as folder:
        _compare(run, Path(folder))
        if not run.small:
            with run.attempt("3B, quantize"):
                _time_layers(run, Path(folder))


def _compare(run: Run, folder: Path) -> None:
    kl, seconds = {}, {}
    for device in dict.fromkeys((run.device, "cpu")):
        options = QuantizeOptions(QuantScheme(64), "rtn" if run.small else "awq-gptq",
                                  evaluate=True, device=device)  # fmt: skip
        start = time.perf_counter()
        report: dict[str, Any] = quantize(TINY_VILA, folder / device, options)
        seconds[device] = time.perf_counter() - start
        kl[device] = report["evaluation"]["quality"]["all"]["kl_mean"]
    run.add(
        "quantize", "tiny-vila", kl_mean=kl[run.device], kl_mean_cpu=kl["cpu"],
        seconds=seconds[run.device], seconds_cpu=seconds["cpu"],
        agrees=max(kl.values()) < RATIO * min(kl.values()),
    )  # fmt: skip


def _time_layers(run: Run, folder: Path) -> None:
    """Time decoder layers of 3B's shapes: what more of them take."""
    full, times = preset(MODELS["3B"], "fp16"), []
    for layers in LAYERS:
        root = folder / f"checkpoint-{layers}"
        write_checkpoint(root, replace(full, llm=replace(full.llm, num_layers=layers)))
        options = QuantizeOptions(
            QuantScheme(128), evaluate=False, device=run.device, text_only=True
        )  # fmt: skip
        start = time.perf_counter()
        quantize(root, folder / f"quantized-{layers}", options)
        times.append(time.perf_counter() - start)
    few, many = LAYERS
    run.add(
        "quantize", "3B, a layer", weights="random", algorithm=options.algorithm,
        seconds_a_layer=(times[1] - times[0]) / (many - few),
    )  # fmt: skip
