"""Quantizing a checkpoint from beginning to end: check, calibrate, layer by layer, report."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.config import with_template
from vila_deploy.checkpoint.expected import has_bias
from vila_deploy.errors import VilaDeployError
from vila_deploy.files import canonical_json, new_folder
from vila_deploy.formats import awq_gemm
from vila_deploy.model.llm import LINEARS, NORMS, dense_weight, load_decoder_layer
from vila_deploy.progress import progress
from vila_deploy.quantize.awq import LayerResult, quantize_layer, steps_per_layer
from vila_deploy.quantize.calibrate import Calibration, calibrate
from vila_deploy.quantize.examples import load_examples
from vila_deploy.quantize.output import (
    ShardWriter,
    copy_parts,
    write_checksums,
    write_llm_config,
)
from vila_deploy.quantize.plan import Options, QuantizePlan, plan
from vila_deploy.quantize.report import build_report, layer_entry, markdown, rtn_entry
from vila_deploy.quantize.round import round_to_nearest, to_float16
from vila_deploy.quantize.sequences import Sequences

LayerEntry = dict[str, Any]


def quantize(root: Path, out: Path, options: Options) -> dict[str, Any]:
    """Writes the 4-bit checkpoint `out`, which appears whole or not at all.

    Returns:
        the report, as in `out`/report.json.

    Raises:
        VilaDeployError: anything that is wrong with the checkpoint, the options or the disk.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(root)
    checkpoint.config = with_template(checkpoint.config, options.prompt_template)
    planned = plan(checkpoint.config, options)
    awq = options.algorithm == "awq"
    examples = load_examples(options.calib, options.calib_images) if awq else []
    with new_folder(out) as folder:
        _check_space(folder, checkpoint, planned)
        copy_parts(checkpoint, folder)
        writer = ShardWriter(folder / "llm")
        _write_unquantized(checkpoint, writer)
        calibration = calibrate(checkpoint, examples, options.seed) if awq else None
        if calibration is None:
            layers = _round_layers(checkpoint, options, writer)
        else:
            layers = _awq_layers(checkpoint, options, calibration, writer)
        writer.finish()
        write_llm_config(checkpoint, folder, options.scheme)
        write_checksums(folder)
        report = build_report(
            checkpoint, folder, options, calibration, layers, time.monotonic() - start
        )
        (folder / "report.json").write_text(canonical_json(report), "utf-8")
        (folder / "report.md").write_text(markdown(report), "utf-8")
    return report


def _check_space(folder: Path, checkpoint: Checkpoint, planned: QuantizePlan) -> None:
    copied = sum(
        f.stat().st_size for f in (*checkpoint.vision.files(), *checkpoint.projector.files())
    )
    written = sum(part.bytes for part in planned.components if part.name.startswith("llm"))
    free = shutil.disk_usage(folder).free
    if free < copied + written:
        raise VilaDeployError(
            f"needs {(copied + written) / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free",
            where=folder.parent,
            fix="free some space or choose another -o",
        )


def _write_unquantized(checkpoint: Checkpoint, writer: ShardWriter) -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not checkpoint.config.llm.tie_word_embeddings:
        names.append("lm_head.weight")
    for name in names:
        writer.add(name, to_float16(checkpoint.llm.tensor(name), name))


def _awq_layers(
    checkpoint: Checkpoint, options: Options, calibration: Calibration, writer: ShardWriter
) -> list[LayerEntry]:
    config = checkpoint.config.llm
    sequences = Sequences.of(config, calibration.embeds)
    calibration.embeds.clear()
    entries = []
    with _steps(config.num_layers, steps_per_layer(config)) as step:
        for index in range(config.num_layers):
            where = f"model.layers.{index}"
            layer = load_decoder_layer(config, checkpoint.llm, index)
            # Loading maps float32 weights from the file; folding must not write into it.
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()
            result = quantize_layer(
                layer,
                partial(_original, checkpoint, where),
                sequences,
                options.scheme,
                where,
                step(index),
            )
            _write_layer(writer, where, result)
            entries.append(layer_entry(index, result))
            del layer, result
            gc.collect()
    return entries


def _original(checkpoint: Checkpoint, where: str, name: str) -> Tensor:
    return dense_weight(checkpoint.llm, f"{where}.{name}", torch.float32)


def _round_layers(
    checkpoint: Checkpoint, options: Options, writer: ShardWriter
) -> list[LayerEntry]:
    entries = []
    with _steps(checkpoint.config.llm.num_layers, len(LINEARS)) as step:
        for index in range(checkpoint.config.llm.num_layers):
            where, on_step = f"model.layers.{index}", step(index)
            _write_norms(
                writer, where, {n: checkpoint.llm.tensor(f"{where}.{n}.weight") for n in NORMS}
            )
            errors = {}
            for name in LINEARS:
                on_step(f"rounding {name}")
                weight = dense_weight(checkpoint.llm, f"{where}.{name}", torch.float32)
                bias = None
                if has_bias(checkpoint.config.llm, name):
                    bias = checkpoint.llm.tensor(f"{where}.{name}.bias")
                linear = round_to_nearest(weight, options.scheme, f"{where}.{name}", bias)
                power = float(weight.square().mean())
                lost = float((linear.dequantize() - weight).square().mean())
                errors[name] = lost / power if power else 0.0
                for part, tensor in awq_gemm.pack(linear).items():
                    writer.add(f"{where}.{name}.{part}", tensor)
            entries.append(rtn_entry(index, errors))
    return entries


def _write_layer(writer: ShardWriter, where: str, result: LayerResult) -> None:
    _write_norms(writer, where, result.norms)
    for name, linear in result.linears.items():
        for part, tensor in awq_gemm.pack(linear).items():
            writer.add(f"{where}.{name}.{part}", tensor)


def _write_norms(writer: ShardWriter, where: str, norms: dict[str, Tensor]) -> None:
    for name, weight in norms.items():
        full = f"{where}.{name}.weight"
        writer.add(full, to_float16(weight, full))


@contextmanager
def _steps(
    num_layers: int, steps_per_layer: int
) -> Iterator[Callable[[int], Callable[[str], None]]]:
    """Yields layer → on_step: a call says what begins now, and so ends what was before it."""
    with progress(num_layers * steps_per_layer, "quantizing") as advance:
        first = True

        def of_layer(index: int) -> Callable[[str], None]:
            def on_step(text: str) -> None:
                nonlocal first
                advance(f"layer {index + 1}/{num_layers}: {text}", 0 if first else 1)
                first = False

            return on_step

        yield of_layer
        advance("done")
