"""What a quantization will take and give, from the configs alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.expected import (
    decoder_linears,
    expected_llm,
    expected_projector,
    expected_tower,
    has_bias,
)
from vila_deploy.errors import VilaDeployError
from vila_deploy.formats.registry import FORMATS, SHARD_BYTES
from vila_deploy.quantize.scheme import QuantScheme, check_scheme
from vila_deploy.sizes import Component, Stage, available_memory_bytes, parameters

ALGORITHMS = ("awq-gptq", "awq", "rtn")
# Python, torch and transformers themselves, as measured on Linux.
PROGRAM_BYTES = 600 << 20
FLOAT32, FLOAT16 = 4, 2


@dataclass(frozen=True)
class Options:
    """What the user asks for; see `vila-quantize --help`.

    Args:
        evaluate: None: if it costs less than the quantization, that is with calibration data, or
            if `eval` names data.
    """

    scheme: QuantScheme = field(default_factory=QuantScheme)
    algorithm: str = "awq-gptq"
    calib: Path | None = None
    calib_images: Path | None = None
    seed: int = 0
    prompt_template: str | None = None
    formats: tuple[str, ...] = ("awq",)
    text_only: bool = False
    evaluate: bool | None = None
    eval: Path | None = None

    @property
    def calibrates(self) -> bool:
        """Whether the algorithm needs calibration data."""
        return self.algorithm != "rtn"

    @property
    def evaluates(self) -> bool:
        """Whether the result is compared with the original."""
        default = self.calibrates or self.eval is not None
        return default if self.evaluate is None else self.evaluate


@dataclass(frozen=True)
class QuantizePlan:
    """`device_bytes` is the peak memory on this computer, `limit_bytes` what is available on it."""

    fits: bool
    device_bytes: int
    limit_bytes: int
    output_bytes: int
    bits_per_weight: float
    components: tuple[Component, ...]
    stages: tuple[Stage, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: VilaConfig, options: Options, tokens: int = 128 * 512) -> QuantizePlan:
    """Sizes and peak memory of quantizing a checkpoint with this config.

    Args:
        tokens: of the calibration set; by default the most that it can have.

    Raises:
        VilaDeployError: the scheme doesn't fit the model, or it is quantized already.
    """
    check_not_quantized(config)
    check_scheme(options.scheme, config.llm)
    for name in options.formats:
        FORMATS[name].check(config, options.scheme)
    components = output_components(config, options.scheme)
    stages = _stages(config, options, tokens)
    peak, limit = max(stage.memory_bytes for stage in stages), available_memory_bytes()
    return QuantizePlan(
        fits=peak <= limit,
        device_bytes=peak,
        limit_bytes=limit,
        output_bytes=len(options.formats) * sum(component.bytes for component in components),
        bits_per_weight=options.scheme.bits_per_weight,
        components=components,
        stages=stages,
    )


def work_path(out: Path) -> Path:
    """Where `--resume` keeps the finished layers of the output folder `out`."""
    return out.with_name(f"{out.name}.partial")


def check_not_quantized(config: VilaConfig) -> None:
    """Raises if llm/ holds 4-bit weights."""
    found = config.llm.quantization
    if found is not None:
        raise VilaDeployError(
            f"is quantized already ({found.bits} bits, group size {found.group_size})",
            where=f"llm/, in the layout of {found.version}",
            fix="build an engine from it, or give the original fp16 checkpoint",
        )


def output_components(config: VilaConfig, scheme: QuantScheme) -> tuple[Component, ...]:
    """The parts of the quantized checkpoint."""
    llm = config.llm
    linears = llm.num_layers * sum(map(math.prod, decoder_linears(llm).values()))
    embedding = llm.vocab_size * llm.hidden_size
    norms = llm.hidden_size * (2 * llm.num_layers + 1)
    components = [
        Component.of("llm decoder linears", linears, scheme.bits_per_weight),
        _float16("llm embeddings", embedding),
        _float16("llm norms", norms),
        _float16("vision tower", parameters(expected_tower(config))),
        _float16("projector", parameters(expected_projector(config))),
    ]
    rows = {name: out for name, (out, _) in decoder_linears(llm).items() if has_bias(llm, name)}
    if rows:
        components.insert(2, _float16("llm biases", llm.num_layers * sum(rows.values())))
    if not llm.tie_word_embeddings:
        components.insert(2, _float16("llm head", embedding))
    return tuple(components)


def _float16(name: str, count: int) -> Component:
    return Component.of(name, count, 16)


def _stages(config: VilaConfig, options: Options, tokens: int) -> tuple[Stage, ...]:
    llm = config.llm
    layer = sum(map(math.prod, decoder_linears(llm).values())) * FLOAT32
    table = llm.vocab_size * llm.hidden_size
    # A shard of each format waits in memory until it is full; the embedding is never split.
    shard = min(SHARD_BYTES, sum(parameters([t]) for t in expected_llm(llm)) * FLOAT16)
    shard *= len(options.formats)
    write = Stage("write embeddings and head", PROGRAM_BYTES + shard + table * (FLOAT16 + FLOAT32))
    if options.algorithm == "rtn":
        return (
            Stage("round each decoder layer", PROGRAM_BYTES + shard + layer * 2),
            write,
        )
    hidden = tokens * llm.hidden_size * FLOAT32
    tower = (parameters(expected_tower(config)) + parameters(expected_projector(config))) * FLOAT32
    grams = sum({width: width * width for _, width in decoder_linears(llm).values()}.values())
    search = PROGRAM_BYTES + shard + 3 * layer + 5 * hidden + 2 * grams * FLOAT32
    return (
        Stage("encode pictures and embed tokens", PROGRAM_BYTES + tower + 2 * hidden),
        Stage("search and round each decoder layer", search),
        write,
    )
