"""What a quantization will take and give, from the configs alone."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import projector_tensor_specs, tower_tensor_specs
from vila_deploy.data.data_size import DataSize, data_size
from vila_deploy.data.examples import load_examples, load_held_out
from vila_deploy.formats.scheme import QuantScheme, check_scheme
from vila_deploy.quantize.estimate import time
from vila_deploy.quantize.estimate.memory import MemoryNeed, spilled
from vila_deploy.quantize.estimate.time import Effort, Speed
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import MemoryItem, PlanStep, available_memory_bytes, parameters
from vila_deploy.utils.limits import (
    MAX_CALIBRATION_SEQUENCES,
    MAX_EVALUATION_SEQUENCES,
    MAX_TOKENS,
)
from vila_deploy.writers.registry import FORMATS, SHARD_BYTES

WORK_SUFFIX = ".partial"
LONGEST_NAME = 255 - len(WORK_SUFFIX)


@dataclass(frozen=True)
class QuantizePlan:
    """`device_bytes` is the peak memory on this computer, `limit_bytes` what is available on it.

    Args:
        seconds: of all stages; None if this computer's speed was not asked for.
        output_bytes: weights of all formats.
        kept_bytes: finished layers, for --resume, until the output is whole.
        scratch_bytes: activations in files while it runs.
    """

    fits: bool
    device_bytes: int
    limit_bytes: int
    seconds: float | None
    output_bytes: int
    kept_bytes: int
    scratch_bytes: int
    bits_per_weight: float
    components: tuple[MemoryItem, ...]
    stages: tuple[PlanStep, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    config: VilaConfig,
    options: QuantizeOptions,
    calibration: DataSize | None = None,
    evaluation: DataSize | None = None,
    speed: Speed | None = None,
) -> QuantizePlan:
    """Sizes, peak memory and, with this computer's speed, time of quantizing such a checkpoint.

    Args:
        calibration, evaluation: how much data there is; by default the most text that is taken.

    Raises:
        VilaDeployError: the scheme doesn't fit the model, or it is quantized already.
    """
    check_not_quantized(config)
    check_scheme(options.scheme, config.llm)
    for name in options.formats:
        FORMATS[name].check(config, options.scheme)
    components = output_components(config, options.scheme)
    calibration = calibration or DataSize(MAX_CALIBRATION_SEQUENCES * MAX_TOKENS)
    stages = _stages(
        config,
        options,
        calibration,
        evaluation or DataSize(MAX_EVALUATION_SEQUENCES * MAX_TOKENS),
        speed,
    )
    peak, limit = max(stage.memory_bytes for stage in stages), available_memory_bytes()
    return QuantizePlan(
        fits=peak <= limit,
        device_bytes=peak,
        limit_bytes=limit,
        seconds=sum(stage.seconds or 0.0 for stage in stages) if speed else None,
        output_bytes=len(options.formats) * sum(component.bytes for component in components),
        kept_bytes=components[0].bytes if options.calibrates else 0,
        scratch_bytes=scratch_bytes(config, options, calibration.tokens),
        bits_per_weight=options.scheme.bits_per_weight,
        components=components,
        stages=stages,
    )


def scratch_bytes(config: VilaConfig, options: QuantizeOptions, tokens: int) -> int:
    """Of activations in files, with so many tokens of calibration data."""
    return spilled(config, tokens) if options.algorithm == "awq-gptq" else 0


def work_path(out: Path) -> Path:
    """Where the finished layers of the output folder `out` are kept."""
    name = out.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        # The longest legal name leaves no room for a suffix.
        name = f"{name[:32]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return out.parent / f"{name}{WORK_SUFFIX}"


def check_not_quantized(config: VilaConfig) -> None:
    """Raises if llm/ holds 4-bit weights."""
    found = config.llm.quantization
    if found is not None:
        raise VilaDeployError(
            f"is quantized already ({found.bits} bits, group size {found.group_size})",
            where=f"llm/, in the layout of {found.version}",
            fix="build an engine from it, vila-convert it, or give the original fp16 checkpoint",
        )


def output_components(config: VilaConfig, scheme: QuantScheme) -> tuple[MemoryItem, ...]:
    """The parts of the quantized checkpoint."""
    llm = config.llm
    linears = llm.num_layers * sum(map(math.prod, llm.linears.values()))
    embedding = llm.vocab_size * llm.hidden_size
    norms = llm.hidden_size * (2 * llm.num_layers + 1)
    components = [
        MemoryItem.of("llm decoder linears", linears, scheme.bits_per_weight),
        _float16("llm embeddings", embedding),
        _float16("llm norms", norms),
        _float16("vision tower", parameters(tower_tensor_specs(config))),
        _float16("projector", parameters(projector_tensor_specs(config))),
    ]
    rows = {name: out for name, (out, _) in llm.linears.items() if llm.has_bias(name)}
    if rows:
        components.insert(2, _float16("llm biases", llm.num_layers * sum(rows.values())))
    if not llm.tie_word_embeddings:
        components.insert(2, _float16("llm head", embedding))
    return tuple(components)


def _float16(name: str, count: int) -> MemoryItem:
    return MemoryItem.of(name, count, 16)


def measured_plan(config: VilaConfig, options: QuantizeOptions) -> QuantizePlan:
    """`plan` with as much data as `options` name, and times by a probe of this computer.

    Raises:
        VilaDeployError: as `plan`, or the data can't be read.
    """
    check_scheme(options.scheme, config.llm)
    calibration = evaluation = None
    if options.calibrates:
        own = load_examples(options.calib, options.calib_images, text_only=options.text_only)
        calibration = data_size(config, own, MAX_CALIBRATION_SEQUENCES)
    if options.evaluates:
        evaluation = data_size(config, load_held_out(options.eval), MAX_EVALUATION_SEQUENCES)
    return plan(config, options, calibration, evaluation, time.probe(config))


def _stages(
    config: VilaConfig,
    options: QuantizeOptions,
    calibration: DataSize,
    evaluation: DataSize,
    speed: Speed | None,
) -> tuple[PlanStep, ...]:
    llm, group_size = config.llm, options.scheme.group_size
    linears = output_components(config, options.scheme)[0].bytes
    # A shard of each format waits in memory until it is full.
    pending = min(SHARD_BYTES, linears) * len(options.formats)
    need = MemoryNeed(config, group_size, pending)

    def stage(name: str, memory_bytes: int, work: Effort) -> PlanStep:
        return PlanStep(name, memory_bytes, work.seconds(speed) if speed else None)

    tokens, table = calibration.tokens, llm.vocab_size * llm.hidden_size
    stages = [stage("write embeddings and head", need.write_tables(), Effort(bytes=40.0 * table))]
    if options.calibrates:
        name, encoding = (
            "encode images and embed tokens",
            time.encode(config, calibration.tiles),
        )
        stages.append(stage(name, need.encode(tokens, calibration.tiles_at_once), encoding))
    if options.algorithm == "rtn":
        name, memory, work = "round", need.round_to_nearest(), time.round_to_nearest(config)
    elif options.algorithm == "awq":
        name, memory, work = "search and round", need.awq(tokens), time.awq(config, tokens)
    else:
        name, memory = "learn scales of and round", need.awq_gptq(tokens)
        work = time.awq_gptq(config, tokens, group_size)
    stages.append(stage(f"{name} each decoder layer", memory, work))
    if options.evaluates:
        memory = need.evaluate(evaluation.tokens, evaluation.image_tokens)
        work = time.evaluate(config, evaluation.tokens)
        work += time.encode(config, evaluation.tiles)
        stages.append(stage("compare with the original", memory, work))
    return tuple(stages)
