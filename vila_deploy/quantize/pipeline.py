"""Quantize a checkpoint: check, calibrate, quantize layer by layer, evaluate, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.config import config_of
from vila_deploy.checkpoint.folder_layout import find_layout
from vila_deploy.checkpoint.hub import fetch_checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, LlmConfig, layer_prefix
from vila_deploy.checkpoint.lora import Adapter, open_adapter
from vila_deploy.data.examples import Example, load_examples, load_held_out
from vila_deploy.engine.memory import MemoryRow
from vila_deploy.eval.data import evaluation_data
from vila_deploy.eval.fidelity import evaluate
from vila_deploy.formats.registry import FORMATS
from vila_deploy.processing.own_template import follow_tokenizer
from vila_deploy.processing.vocabulary import check_vocabulary
from vila_deploy.quantize.algorithms.awq import Awq
from vila_deploy.quantize.algorithms.awq_gptq import AwqGptq
from vila_deploy.quantize.algorithms.base import LayerEntry, LayerQuantizer, OnStep
from vila_deploy.quantize.algorithms.rtn import Rtn
from vila_deploy.quantize.bit_choice import BitChoice
from vila_deploy.quantize.calibrate import Calibration, calibrate
from vila_deploy.quantize.data_warnings import data_warnings
from vila_deploy.quantize.estimate.plan import (
    LLM_ROWS,
    QuantizePlan,
    check_not_quantized,
    plan,
    planned_layers,
    scratch_bytes,
)
from vila_deploy.quantize.layer_files import FinishedLayer
from vila_deploy.quantize.model_card import model_card
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.report import RunCost, build_report
from vila_deploy.quantize.report_markdown import markdown
from vila_deploy.quantize.resume import WorkFolder, refuse_finished_layers, work_folder
from vila_deploy.quantize.sensitivity import search_bits
from vila_deploy.quantize.shared_work_folder import shared_work_folder
from vila_deploy.quantize.unquantized import with_int8_tower, write_unquantized
from vila_deploy.utils.device import choose_device
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json, check_new, new_folder
from vila_deploy.utils.host_memory import PeakMemory, give_back, resident_bytes
from vila_deploy.utils.progress import progress
from vila_deploy.writers.folder import CheckpointWriter


def quantize(
    root: Path, out: Path, options: QuantizeOptions, *, resume: bool = False
) -> dict[str, Any]:
    """Write the 4-bit checkpoint `out`, which appears complete or not at all.

    Args:
        root: of a checkpoint on this computer, or a repository's name on the hub.
        resume: go on from the finished layers that a run which ended early has left in the work
            folder beside `out`. On one computer the bytes are those of a run without interruption,
            except for time and memory in report.json and report.md. RTN, which takes minutes,
            keeps finished layers only with `resume`.

    Returns:
        the report, as in `out`/report.json.

    Raises:
        VilaDeployError: the checkpoint, the options, the disk or the work folder is unfit.
    """
    root, start = _fetch(root, out, options), time.monotonic()
    checkpoint, adapter = _open(root, options)
    planned = plan(checkpoint.config, options)
    device = choose_device(options.device, planned.device_bytes)
    examples = _calibration_examples(options)
    held_out = _held_out_examples(options)
    warnings = data_warnings(options, examples, held_out)
    with ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        work = None
        if resume or options.calibrates:
            opened = work_folder(out, checkpoint, options, device, resume=resume, adapter=adapter)
            work = stack.enter_context(opened)
        else:
            refuse_finished_layers(out)
        folder = stack.enter_context(new_folder(out, work.path if work else None))
        disk = _DiskSpace(out, checkpoint, planned, work, len(options.formats))
        disk.check()
        checkpoint.digests((EMBEDDING,))
        calibration = _calibrated(checkpoint, examples, options, device, disk, work)
        options, choice, more = _with_bits(checkpoint, calibration, options, device, folder, work)
        written = with_int8_tower(checkpoint, choice)
        outputs = CheckpointWriter(written, folder, options.formats, options.scheme)
        write_unquantized(checkpoint, outputs, options.scheme)
        held_out_data = evaluation_data(checkpoint, held_out, options.eval is not None, device)
        quantizer = _layer_quantizer(checkpoint, options, calibration, device, folder)
        layers, saved_seconds = _write_layers(checkpoint.config.llm, quantizer, outputs, work)
        outputs.finish()
        del quantizer
        written_at, checkpoints = time.monotonic(), _checkpoints(folder, options)
        evaluation = None
        if held_out_data:
            quantized = open_checkpoint(checkpoints[0])
            evaluation = evaluate(checkpoint, quantized, held_out_data, device)
        cost = _cost(start - saved_seconds, written_at, memory, device)
        report = build_report(
            checkpoint, folder, options, calibration, layers, evaluation, [*warnings, *more], cost,
            adapter, choice,
        )  # fmt: skip
        _write_report(checkpoint, report, folder, checkpoints)
    return report


def quantize_layers(
    root: Path, out: Path, options: QuantizeOptions, *, resume: bool = False
) -> dict[str, Any]:
    """Quantize the decoder layers `options.layers` alone, into the work folder beside `out`.

    Several programs, on computers that share the folder, may each do a part; `quantize` with
    `resume` then joins the layers, to the bytes of one run on such a computer.

    Args:
        resume: go on from the finished ones of these layers.

    Returns:
        `work_folder`, the `layers` that are finished by this, and those `remaining` for others.

    Raises:
        VilaDeployError: as `quantize`, or another program is at work on one of the layers.
    """
    root = _fetch(root, out, options)
    checkpoint, adapter = _open(root, options)
    planned = plan(checkpoint.config, options)
    layers = planned_layers(checkpoint.config, options)
    device = choose_device(options.device, planned.device_bytes)
    examples = _calibration_examples(options)
    folder = shared_work_folder(
        out, checkpoint, options, device, layers, resume=resume, adapter=adapter
    )
    with folder as work:
        missing = [index for index in layers if index not in work.finished]
        if missing:
            size = planned.kept_bytes * len(missing) // len(layers)
            _check_free_space(out.parent, size, f"{size / 1e6:,.1f} MB for finished layers")
            calibration = (
                calibrate(checkpoint, examples, options.seed, device) if examples else None
            )
            if calibration:
                work.check_calibration(calibration.sha256)
            quantizer = _layer_quantizer(checkpoint, options, calibration, device, work.path)
            _finish_layers(checkpoint.config.llm, quantizer, work, missing)
        return {
            "work_folder": str(work.path),
            "layers": list(layers),
            "remaining": work.remaining(),
        }


def _open(root: Path, options: QuantizeOptions) -> tuple[Checkpoint, Adapter | None]:
    """Return the checked checkpoint as the user asks for it, and the adapter merged into it."""
    layout = find_layout(root)
    tokenizer = layout.folder("llm")
    config = follow_tokenizer(config_of(layout, options.prompt_template), tokenizer)
    checkpoint = open_checkpoint(root, config)
    check_vocabulary(tokenizer, config)
    if options.lora is None:
        return checkpoint, None
    check_not_quantized(checkpoint.config)
    adapter = open_adapter(options.lora, checkpoint.config)
    adapter.merge_into(checkpoint)
    return checkpoint, adapter


def _fetch(root: Path, out: Path, options: QuantizeOptions) -> Path:
    """Return the checkpoint's folder, fetched unless something is wrong that needs no weights."""

    def check(folder: Path) -> None:
        check_new(out)
        plan(_open(folder, options)[0].config, options)
        data_warnings(options, _calibration_examples(options), _held_out_examples(options))

    return fetch_checkpoint(root, check, options.prompt_template)


def _calibration_examples(options: QuantizeOptions) -> list[Example]:
    if not options.calibrates:
        return []
    return load_examples(options.calib, options.calib_images, text_only=options.text_only)


def _held_out_examples(options: QuantizeOptions) -> list[Example]:
    return load_held_out(options.eval, options.calib_images) if options.evaluates else []


def _layer_quantizer(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    calibration: Calibration | None,
    device: torch.device,
    scratch: Path,
) -> LayerQuantizer:
    if options.algorithm == "rtn" or calibration is None:
        return Rtn(checkpoint, options.scheme, device)
    if options.algorithm == "awq":
        return Awq(checkpoint, options.scheme, calibration, device)
    return AwqGptq(checkpoint, options.scheme, calibration, device, scratch)


def _cost(start: float, written_at: float, memory: PeakMemory, device: torch.device) -> RunCost:
    """Return the cost of a run that began at `start` and evaluates since `written_at`."""
    now = time.monotonic()
    seconds = round(now - start, 3), round(now - written_at, 3)
    return RunCost(*seconds, memory.own_bytes, resident_bytes(), device.type)


def _write_report(
    checkpoint: Checkpoint, report: dict[str, Any], folder: Path, checkpoints: list[Path]
) -> None:
    (folder / "report.json").write_text(canonical_json(report), "utf-8")
    (folder / "report.md").write_text(markdown(report), "utf-8")
    for path in checkpoints:
        (path / "README.md").write_text(model_card(checkpoint, report), "utf-8")


def _checkpoints(folder: Path, options: QuantizeOptions) -> list[Path]:
    """Return the folders of the checkpoints in `folder`, one a format."""
    several = len(options.formats) > 1
    return [folder / name for name in options.formats] if several else [folder]


@dataclass(frozen=True)
class _DiskSpace:
    """The need of a run for space on the disk that `out` will be on."""

    out: Path
    checkpoint: Checkpoint
    planned: QuantizePlan
    work: WorkFolder | None
    formats: int

    def check(self, scratch: int = 0) -> None:
        """Raise VilaDeployError if there is too little.

        Args:
            scratch: bytes of activations in files.
        """
        parts = (*self.checkpoint.vision.files(), *self.checkpoint.projector.files())
        items = self.planned.items
        llm = sum(item.bytes for row, item in items.items() if row in LLM_ROWS)
        needed = self.formats * (sum(file.stat().st_size for file in parts) + llm)
        layers = 0
        if self.work is not None:
            layers = max(0, items[MemoryRow.DECODER_LINEARS].bytes - self.work.layer_bytes)
        also = {
            "finished layers until it is done": layers,
            "activations while it runs": scratch,
        }
        more = [f" and {size / 1e6:,.1f} MB for {what}" for what, size in also.items() if size]
        _check_free_space(
            self.out.parent, needed + layers + scratch, f"{needed / 1e6:,.1f} MB{''.join(more)}"
        )


def _check_free_space(folder: Path, size: int, text: str) -> None:
    """Raise VilaDeployError if `size` bytes, as `text` names them, are not free at `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise VilaDeployError(
            f"needs {text}, {free / 1e6:,.1f} MB are free",
            where=folder,
            fix="free some space or choose another -o",
        )


def _calibrated(
    checkpoint: Checkpoint,
    examples: list[Example],
    options: QuantizeOptions,
    device: torch.device,
    disk: _DiskSpace,
    work: WorkFolder | None,
) -> Calibration | None:
    """Return the embedded calibration data, if any, that finished layers were made with too."""
    if not examples:
        return None
    calibration = calibrate(checkpoint, examples, options.seed, device)
    disk.check(scratch_bytes(checkpoint.config, options, sum(map(len, calibration.embeds))))
    if work:
        work.check_calibration(calibration.sha256)
    return calibration


def _with_bits(
    checkpoint: Checkpoint,
    calibration: Calibration | None,
    options: QuantizeOptions,
    device: torch.device,
    scratch: Path,
    work: WorkFolder | None,
) -> tuple[QuantizeOptions, BitChoice | None, list[str]]:
    """Return the options with the bits that --bits-per-weight gives, the choice, and warnings."""
    if options.bits_per_weight is None or calibration is None or work is None:
        return options, None, []
    choose = partial(search_bits, checkpoint, calibration, options, device, scratch)
    choice = work.bit_choice(choose)
    scheme = choice.scheme(options.scheme)
    said = (FORMATS[name].packing.warning(scheme) for name in options.formats)
    return replace(options, scheme=scheme), choice, [warning for warning in said if warning]


def _write_layers(
    config: LlmConfig, quantizer: LayerQuantizer, outputs: CheckpointWriter, work: WorkFolder | None
) -> tuple[list[LayerEntry], float]:
    """Write all layers, finished ones out of `work`.

    Returns:
        the report's entries, and how many seconds the finished ones took when they were computed.
    """
    finished = work.finished if work else frozenset()
    missing = [index for index in range(config.num_layers) if index not in finished]
    entries, saved_seconds = [], 0.0
    with _steps(config.num_layers, len(missing) * quantizer.steps_per_layer) as step:
        for index in range(config.num_layers):
            if work and index in finished:
                layer = work.load(index)
                saved_seconds += layer.seconds
                if missing and index < missing[-1]:
                    step(index, 0)("finished before; its outputs")
                    quantizer.skip(index, layer.tensors)
            else:
                layer = _quantized(quantizer, index, step(index, 1))
                if work:
                    work.save(index, layer)
            for name, value in layer.tensors.items():
                outputs.add(name, value)
            entries.append(layer.entry)
            del layer
            give_back()
    return entries, saved_seconds


def _finish_layers(
    config: LlmConfig, quantizer: LayerQuantizer, work: WorkFolder, missing: list[int]
) -> None:
    """Quantize the layers `missing` into `work`; those before them pass on the hidden states."""
    with _steps(config.num_layers, len(missing) * quantizer.steps_per_layer) as step:
        for index in range(missing[-1] + 1):
            if index in missing:
                work.save(index, _quantized(quantizer, index, step(index, 1)))
            else:
                step(index, 0)("its outputs")
                quantizer.skip(index, {})
            give_back()


def _quantized(quantizer: LayerQuantizer, index: int, on_step: OnStep) -> FinishedLayer:
    start = time.monotonic()
    quantizer.checkpoint.digests((f"{layer_prefix(index)}.",))
    result = quantizer.quantize(index, on_step)
    return FinishedLayer(*result, time.monotonic() - start)


@contextmanager
def _steps(num_layers: int, total: int) -> Iterator[Callable[[int, int], OnStep]]:
    """Yield a function (layer, steps) → on_step for one layer.

    A call of on_step begins a step, which counts as `steps`, and ends the one before.
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
