"""Quantizing a checkpoint from beginning to end: check, calibrate, layer by layer, report."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.config import with_template
from vila_deploy.checkpoint.expected import has_bias
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.errors import VilaDeployError
from vila_deploy.files import canonical_json, new_folder
from vila_deploy.formats.quantized_linear import QuantizedLinear
from vila_deploy.model.llm import LINEARS, NORMS, dense_weight, load_decoder_layer
from vila_deploy.progress import progress
from vila_deploy.quantize.awq import quantize_layer, steps_per_layer
from vila_deploy.quantize.calibrate import Calibration, calibrate
from vila_deploy.quantize.examples import load_examples
from vila_deploy.quantize.output import Outputs
from vila_deploy.quantize.plan import Options, QuantizePlan, plan
from vila_deploy.quantize.report import build_report, layer_entry, markdown, rtn_entry
from vila_deploy.quantize.round import round_to_nearest, to_float16
from vila_deploy.quantize.scheme import QuantScheme
from vila_deploy.quantize.sequences import Sequences
from vila_deploy.quantize.work import FinishedLayer, WorkFolder, work_folder

LayerEntry = dict[str, Any]
LayerTensors = dict[str, Tensor | QuantizedLinear]
OnStep = Callable[[str], None]


def quantize(root: Path, out: Path, options: Options, *, resume: bool = False) -> dict[str, Any]:
    """Writes the 4-bit checkpoint `out`, which appears whole or not at all.

    Args:
        resume: keep finished layers in a work folder beside `out` if the program ends early, and
            go on from those that are there. On one computer the bytes are those of a run without
            interruption, save for the time and memory in report.json and report.md.

    Returns:
        the report, as in `out`/report.json.

    Raises:
        VilaDeployError: anything that is wrong with the checkpoint, the options, the disk or the
            work folder.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(root)
    checkpoint.config = with_template(checkpoint.config, options.prompt_template)
    planned = plan(checkpoint.config, options)
    awq = options.algorithm == "awq"
    examples = load_examples(options.calib, options.calib_images) if awq else []
    with ExitStack() as stack:
        work = stack.enter_context(work_folder(out, checkpoint, options)) if resume else None
        folder = stack.enter_context(new_folder(out, work.path if work else None))
        _check_space(out, checkpoint, planned, work, len(options.formats))
        outputs = Outputs(checkpoint, folder, options.formats, options.scheme)
        _write_unquantized(checkpoint, outputs)
        calibration = calibrate(checkpoint, examples, options.seed) if awq else None
        if calibration and work:
            work.check_calibration(calibration.sha256)
        scheme = options.scheme
        method = _Awq(checkpoint, scheme, calibration) if calibration else _Rtn(checkpoint, scheme)
        layers, saved_seconds = _write_layers(checkpoint.config.llm, method, outputs, work)
        outputs.finish()
        seconds = time.monotonic() - start + saved_seconds
        report = build_report(checkpoint, folder, options, calibration, layers, seconds)
        (folder / "report.json").write_text(canonical_json(report), "utf-8")
        (folder / "report.md").write_text(markdown(report), "utf-8")
    return report


def _check_space(
    out: Path, checkpoint: Checkpoint, planned: QuantizePlan, work: WorkFolder | None, formats: int
) -> None:
    copied = sum(
        f.stat().st_size for f in (*checkpoint.vision.files(), *checkpoint.projector.files())
    )
    sizes = {part.name: part.bytes for part in planned.components if part.name.startswith("llm")}
    needed = formats * (copied + sum(sizes.values()))
    if work:
        needed += max(0, sizes["llm decoder linears"] - work.layer_bytes)
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise VilaDeployError(
            f"needs {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free",
            where=out.parent,
            fix="free some space or choose another -o",
        )


def _write_unquantized(checkpoint: Checkpoint, outputs: Outputs) -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not checkpoint.config.llm.tie_word_embeddings:
        names.append("lm_head.weight")
    for name in names:
        outputs.add(name, to_float16(checkpoint.llm.tensor(name), name))


class _Method(Protocol):
    """How one decoder layer after the other is quantized."""

    steps_per_layer: int

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        """The layer's norms and linears by name and what the report says of it."""

    def skip(self, index: int) -> None:
        """Does to the state of this object what quantizing the layer would do."""


def _write_layers(
    config: LlmConfig, method: _Method, outputs: Outputs, work: WorkFolder | None
) -> tuple[list[LayerEntry], float]:
    """Writes all layers, finished ones out of `work`.

    Returns:
        the report's entries, and how many seconds the finished ones took when they were computed.
    """
    finished = work.finished if work else frozenset()
    missing = [index for index in range(config.num_layers) if index not in finished]
    entries, saved_seconds = [], 0.0
    with _steps(config.num_layers, len(missing) * method.steps_per_layer) as step:
        for index in range(config.num_layers):
            if work and index in finished:
                layer = work.load(index)
                saved_seconds += layer.seconds
                if missing and index < missing[-1]:
                    step(index, 0)("finished before; its outputs")
                    method.skip(index)
            else:
                start = time.monotonic()
                result = method.quantize(index, step(index, 1))
                layer = FinishedLayer(*result, time.monotonic() - start)
                del result
                if work:
                    work.save(index, layer)
            for name, value in layer.tensors.items():
                outputs.add(name, value)
            entries.append(layer.entry)
            del layer
    return entries, saved_seconds


class _Awq:
    """Searches scales and clips on calibration data."""

    def __init__(self, checkpoint: Checkpoint, scheme: QuantScheme, calibration: Calibration):
        self._checkpoint, self._scheme = checkpoint, scheme
        self._config = checkpoint.config.llm
        self._sequences = Sequences.of(self._config, calibration.embeds)
        calibration.embeds.clear()
        self.steps_per_layer = steps_per_layer(self._config)

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        where = f"model.layers.{index}"
        result = quantize_layer(
            self._load(index),
            lambda name: dense_weight(self._checkpoint.llm, f"{where}.{name}", torch.float32),
            self._sequences,
            self._scheme,
            where,
            on_step,
        )
        tensors = _norm_tensors(where, result.norms)
        for name, linear in result.linears.items():
            tensors[f"{where}.{name}"] = linear
        return tensors, layer_entry(index, result)

    def skip(self, index: int) -> None:
        self._sequences.pass_through(self._load(index))

    def _load(self, index: int) -> nn.Module:
        # What is left of the layer before must go first.
        gc.collect()
        layer = load_decoder_layer(self._config, self._checkpoint.llm, index)
        # Loading maps float32 weights from the file; folding must not write into it.
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()
        return layer


class _Rtn:
    """Rounds to nearest."""

    steps_per_layer = len(LINEARS)

    def __init__(self, checkpoint: Checkpoint, scheme: QuantScheme):
        self._checkpoint, self._scheme = checkpoint, scheme

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        llm, where = self._checkpoint.llm, f"model.layers.{index}"
        tensors = _norm_tensors(where, {n: llm.tensor(f"{where}.{n}.weight") for n in NORMS})
        errors = {}
        for name in LINEARS:
            on_step(f"rounding {name}")
            full = f"{where}.{name}"
            weight = dense_weight(llm, full, torch.float32)
            biased = has_bias(self._checkpoint.config.llm, name)
            bias = llm.tensor(f"{full}.bias") if biased else None
            linear = round_to_nearest(weight, self._scheme, full, bias)
            power = float(weight.square().mean())
            lost = float((linear.dequantize() - weight).square().mean())
            errors[name] = lost / power if power else 0.0
            tensors[full] = linear
        return tensors, rtn_entry(index, errors)

    def skip(self, index: int) -> None:
        pass


def _norm_tensors(where: str, norms: dict[str, Tensor]) -> LayerTensors:
    names = {f"{where}.{name}.weight": weight for name, weight in norms.items()}
    return {name: to_float16(weight, name).contiguous() for name, weight in names.items()}


@contextmanager
def _steps(num_layers: int, total: int) -> Iterator[Callable[[int, int], OnStep]]:
    """Yields (layer, steps) → on_step: a call says what begins now, and so ends what was before it.

    What is begun counts as `steps` when it ends.
    """
    with progress(total, "quantizing") as advance:
        begun = 0

        def of_layer(index: int, steps: int) -> OnStep:
            def on_step(text: str) -> None:
                nonlocal begun
                advance(f"layer {index + 1}/{num_layers}: {text}", begun)
                begun = steps

            return on_step

        yield of_layer
        advance("done", begun)
