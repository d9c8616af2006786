"""Predict a quantization from the configs alone: sizes, peak memory, time."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import (
    parameters,
    projector_tensor_specs,
    tower_linears,
    tower_tensor_specs,
)
from vila_deploy.data.data_size import DataSize, data_size
from vila_deploy.data.examples import load_examples, load_held_out
from vila_deploy.engine.memory import Items, MemoryRow
from vila_deploy.formats.base import HEAD_LINEAR, SYMMETRIC_BITS, QuantScheme, check_scheme
from vila_deploy.quantize.estimate import time
from vila_deploy.quantize.estimate.memory import MemoryEstimate, spilled
from vila_deploy.quantize.estimate.time import OperationCost, Speed
from vila_deploy.quantize.options import LM_HEAD, VISION, QuantizeOptions
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import MemoryItem, PlanStep, available_memory_bytes
from vila_deploy.utils.limits import (
    MAX_CALIBRATION_SEQUENCES,
    MAX_EVALUATION_SEQUENCES,
    MAX_TOKENS,
    SENSITIVITY_TOKENS,
)
from vila_deploy.writers.folder import SHARD_BYTES, check_formats

# The parts of llm/.
LLM_ROWS = (
    MemoryRow.DECODER_LINEARS,
    MemoryRow.EMBEDDINGS,
    MemoryRow.HEAD,
    MemoryRow.BIASES,
    MemoryRow.NORMS,
)
WORK_SUFFIX = ".partial"
LONGEST_NAME = 255 - len(WORK_SUFFIX)


@dataclass(frozen=True)
class QuantizePlan:
    """Predicted peak memory on this computer (`device_bytes`), what is available, sizes and time.

    Args:
        seconds: of all steps; None without this computer's speed.
        output_bytes: of the weights in all formats.
        kept_bytes: of finished layers, for --resume, until the output is complete.
        scratch_bytes: of activations in files while it runs.
    """

    fits: bool
    device_bytes: int
    limit_bytes: int
    seconds: float | None
    output_bytes: int
    kept_bytes: int
    scratch_bytes: int
    bits_per_weight: float
    items: Items
    steps: tuple[PlanStep, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `--plan --json` prints it."""
        values = {k: v for k, v in vars(self).items() if k not in ("items", "steps")}
        return {
            **values,
            "components": [vars(item) for item in self.items.values()],
            "stages": [vars(step) for step in self.steps],
        }


def plan(
    config: VilaConfig,
    options: QuantizeOptions,
    calibration: DataSize | None = None,
    evaluation: DataSize | None = None,
    speed: Speed | None = None,
) -> QuantizePlan:
    """Predict sizes, peak memory and, with this computer's speed, time.

    Args:
        calibration, evaluation: how much data there is; by default the most that is used, as text.

    Raises:
        VilaDeployError: the scheme doesn't fit the model, or it is quantized already.
    """
    check_not_quantized(config)
    check_scheme(options.scheme, config.llm.layer_linears(0))
    check_formats(options.formats, config, options.scheme)
    layers = planned_layers(config, options)
    items = planned_items(config, options)
    calibration = calibration or DataSize(MAX_CALIBRATION_SEQUENCES * MAX_TOKENS)
    steps = _steps(
        config,
        options,
        calibration,
        evaluation or DataSize(MAX_EVALUATION_SEQUENCES * MAX_TOKENS),
        speed,
    )
    kept = items[MemoryRow.DECODER_LINEARS].bytes * len(layers) // config.llm.num_layers
    output = len(options.formats) * sum(item.bytes for item in items.values())
    peak, limit = max(step.memory_bytes for step in steps), available_memory_bytes()
    return QuantizePlan(
        fits=peak <= limit,
        device_bytes=peak,
        limit_bytes=limit,
        seconds=sum(step.seconds or 0.0 for step in steps) if speed else None,
        output_bytes=0 if options.layers else output,
        kept_bytes=kept if options.calibrates or options.layers else 0,
        scratch_bytes=scratch_bytes(config, options, calibration.tokens),
        bits_per_weight=items[MemoryRow.DECODER_LINEARS].bits,
        items=items,
        steps=steps,
    )


def planned_layers(config: VilaConfig, options: QuantizeOptions) -> range:
    """Return the indices of the decoder layers to quantize.

    Raises:
        VilaDeployError: the model has fewer than `options.layers` names.
    """
    count = config.llm.num_layers
    return options.layers.of(count) if options.layers else range(count)


def scratch_bytes(config: VilaConfig, options: QuantizeOptions, tokens: int) -> int:
    """Return the bytes of activations in files, with so many tokens of calibration data."""
    return spilled(config, tokens) if options.algorithm == "awq-gptq" else 0


def work_path(out: Path) -> Path:
    """Return the folder that keeps the finished layers of the output folder `out`."""
    name = out.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        # The longest legal name leaves no room for a suffix.
        name = f"{name[:32]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return out.parent / f"{name}{WORK_SUFFIX}"


def check_not_quantized(config: VilaConfig) -> None:
    """Raise VilaDeployError if llm/ holds 4-bit weights."""
    quantization = config.llm.quantization
    if config.vision.int8_linears:
        raise VilaDeployError(
            "has a vision tower in int8, which is quantized already",
            where="vision_tower/config.json: quantization_config",
            fix="give the original fp16 checkpoint",
        )
    if quantization is not None:
        raise VilaDeployError(
            f"is quantized already ({quantization.bits} bits, group size "
            f"{quantization.group_size})",
            where=f"llm/, in the format {quantization.version}",
            fix="build an engine from it, vila-convert it, or give the original fp16 checkpoint",
        )


def planned_items(config: VilaConfig, options: QuantizeOptions) -> Items:
    """Return the parts of the quantized checkpoint as far as the options tell their sizes.

    Head and tower are taken to be in int8 where `--bits-per-weight` may leave them so.
    """
    scheme = options.scheme
    if options.bits_per_weight is None:
        return output_items(config, scheme)
    kept = VISION in options.keep_fp16 or options.text_only
    int8 = () if kept else tuple(tower_linears(config))
    if LM_HEAD not in options.keep_fp16 and not config.llm.tie_word_embeddings:
        bits = {**scheme.linear_bits, HEAD_LINEAR: SYMMETRIC_BITS}
        scheme = replace(scheme, linear_bits=bits)
    return output_items(config, scheme, options.bits_per_weight, int8)


def output_items(
    config: VilaConfig,
    scheme: QuantScheme,
    mean_bits: float | None = None,
    int8_tower_linears: Collection[str] = (),
) -> Items:
    """Return the parts of the quantized checkpoint, with their sizes.

    Args:
        mean_bits: of a value in the layers; by default what `scheme` gives.
    """
    llm = config.llm
    linears = llm.num_layers * sum(map(math.prod, llm.linears.values()))
    if mean_bits is None:
        mean_bits = llm.mean_bits(scheme)
    bits_per_weight = scheme.bits_per_weight + mean_bits - scheme.bits
    embedding = llm.vocab_size * llm.hidden_size
    biases = sum(rows for name, (rows, _) in llm.linears.items() if llm.has_bias(name))
    float16 = {
        MemoryRow.EMBEDDINGS: embedding,
        MemoryRow.HEAD: 0 if llm.tie_word_embeddings else embedding,
        MemoryRow.BIASES: llm.num_layers * biases,
        MemoryRow.NORMS: llm.hidden_size * (2 * llm.num_layers + 1),
        MemoryRow.VISION: parameters(tower_tensor_specs(config)),
        MemoryRow.PROJECTOR: parameters(projector_tensor_specs(config)),
    }
    bits = dict.fromkeys(float16, 16.0)
    if HEAD_LINEAR in scheme.linear_bits:
        head = scheme.of(HEAD_LINEAR)
        bits[MemoryRow.HEAD] = head.bits + 16 / head.group_size
    bits[MemoryRow.VISION] = _tower_bits(config, int8_tower_linears)
    row = MemoryRow.DECODER_LINEARS
    return {row: MemoryItem.of(row.value, linears, bits_per_weight)} | {
        row: MemoryItem.of(row.value, count, bits[row]) for row, count in float16.items() if count
    }


def _tower_bits(config: VilaConfig, int8_linears: Collection[str]) -> float:
    """Return the mean bits of a weight of the tower, scales of int8 linears counted."""
    total = 16 * parameters(tower_tensor_specs(config))
    shapes = tower_linears(config)
    for name in int8_linears:
        total += 16 * shapes[name][0] - 8 * math.prod(shapes[name])
    return total / parameters(tower_tensor_specs(config))


def measured_plan(config: VilaConfig, options: QuantizeOptions) -> QuantizePlan:
    """Return `plan` for the data that `options` name, timed by a probe of this computer.

    Raises:
        VilaDeployError: as `plan`, or the data can't be read.
    """
    check_scheme(options.scheme, config.llm.layer_linears(0))
    calibration = evaluation = None
    if options.calibrates:
        examples = load_examples(options.calib, options.calib_images, text_only=options.text_only)
        calibration = data_size(config, examples, MAX_CALIBRATION_SEQUENCES)
    if options.evaluates:
        evaluation = data_size(
            config, load_held_out(options.eval, options.calib_images), MAX_EVALUATION_SEQUENCES
        )
    return plan(config, options, calibration, evaluation, time.probe(config))


def _steps(
    config: VilaConfig,
    options: QuantizeOptions,
    calibration: DataSize,
    evaluation: DataSize,
    speed: Speed | None,
) -> tuple[PlanStep, ...]:
    llm, group_size = config.llm, options.scheme.group_size
    items = planned_items(config, options)
    linears = items[MemoryRow.DECODER_LINEARS].bytes
    # A shard of each format waits in memory until it is full.
    pending = min(SHARD_BYTES, linears) * len(options.formats)
    memory = MemoryEstimate(config, group_size, pending)

    def step(name: str, memory_bytes: int, cost: OperationCost) -> PlanStep:
        return PlanStep(name, memory_bytes, cost.seconds(speed) if speed else None)

    tokens, table = calibration.tokens, llm.vocab_size * llm.hidden_size
    steps = []
    if not options.layers:
        cost = OperationCost(bytes=40.0 * table)
        steps.append(step("write embeddings and head", memory.write_tables(), cost))
    if options.calibrates:
        peak = memory.encode(tokens, calibration.tiles_at_once)
        cost = time.encode(config, calibration.tiles)
        steps.append(step("encode images and embed tokens", peak, cost))
    if options.bits_per_weight is not None:
        measured = min(tokens, SENSITIVITY_TOKENS)
        cost = time.measure_sensitivities(config, measured)
        steps.append(step("measure sensitivities", memory.measure_sensitivities(measured), cost))
        if calibration.tiles and VISION not in options.keep_fp16:
            tiles = math.ceil(calibration.tiles * measured / tokens)
            # Forward, forward again and back.
            cost = time.encode(config, tiles) * 4
            peak = memory.measure_tower(calibration.tiles_at_once)
            steps.append(step("measure the vision tower", peak, cost))
    if options.algorithm == "rtn":
        name, peak, cost = "round", memory.round_to_nearest(), time.round_to_nearest(config)
    elif options.algorithm == "awq":
        name, peak, cost = "search and round", memory.awq(tokens), time.awq(config, tokens)
    else:
        name, peak = "learn scales of and round", memory.awq_gptq(tokens)
        cost = time.awq_gptq(config, tokens, group_size)
    if options.layers:
        layers = planned_layers(config, options)
        cost *= len(layers) / llm.num_layers
        if options.calibrates:
            cost += time.forward(config, tokens) * layers.start
    steps.append(step(f"{name} each decoder layer", peak, cost))
    if options.evaluates:
        peak = memory.evaluate(evaluation.tokens, evaluation.image_tokens)
        cost = time.evaluate(config, evaluation.tokens)
        cost += time.encode(config, evaluation.tiles)
        steps.append(step("compare with the original", peak, cost))
    return tuple(steps)
