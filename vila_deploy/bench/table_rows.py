"""The rows of the authors' table: which models, and what each will take on this computer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vila_deploy.bench.published import published_models
from vila_deploy.bench.roofline import cache_values_per_token, weight_bytes_per_step
from vila_deploy.builder.build import RANDOM_MAX_SEQ_LEN
from vila_deploy.builder.fit import advise
from vila_deploy.builder.memory_plan import EnginePlan
from vila_deploy.builder.plan import plan_build
from vila_deploy.builder.resolve import BuildOptions, ResolvedBuild, resolve_random_build
from vila_deploy.checkpoint.presets import PRESETS, preset
from vila_deploy.engine.manifest import Manifest, read_manifest
from vila_deploy.engine.memory import MemoryRow
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.target import Target
from vila_deploy.utils.errors import VilaDeployError

AUTHORS_MODELS = (
    "VILA1.5-3b", "VILA1.5-3b-s2", "Llama-3-VILA1.5-8B", "VILA1.5-13b", "VILA1.5-40b",
)  # fmt: skip
PRECISIONS = ("fp16", "int4")
# Beside the image's tokens: the question, and an answer long enough to be timed.
TEXT_TOKENS, LENGTH_STEP = 256, 256


@dataclass(frozen=True)
class TableRow:
    """One line of the table; `engine` is a folder that the user gave for it.

    Args:
        problem: why `engine` can't be measured here; empty if it can.
    """

    model: str
    precision: str
    engine: Path | None = None
    problem: str = ""

    @property
    def title(self) -> str:
        return f"{self.model} {self.precision}"

    @property
    def has_shapes(self) -> bool:
        """Whether the model's shapes are known, so that it can be planned and built."""
        return self.model in PRESETS


def table_rows(every_model: bool, engines: Sequence[Path], target: Target) -> list[TableRow]:
    """Return the authors' ten rows, with the user's engines in place of those of their shapes.

    Engines of other shapes are rows of their own behind them.

    Args:
        every_model: add the models of NVILA and of the first generation.

    Raises:
        VilaDeployError: one of `engines` is no engine, or two are for the same row.
    """
    models = list(AUTHORS_MODELS)
    if every_model:
        models += [m for m in dict.fromkeys((*published_models(), *PRESETS)) if m not in models]
    rows = {(m, precision): TableRow(m, precision) for m in models for precision in PRECISIONS}
    others: list[TableRow] = []
    for folder in dict.fromkeys(engines):
        row = _engine_row(folder, models, target)
        key = row.model, row.precision
        if key not in rows:
            others.append(row)
        elif rows[key].engine is None:
            rows[key] = row
        else:
            raise VilaDeployError(
                f"another engine is given for the row {row.title}", where=folder, fix="give one"
            )
    return [*rows.values(), *others]


def _engine_row(folder: Path, models: Iterable[str], target: Target) -> TableRow:
    manifest = read_manifest(folder)
    names = [m for m in models if m in PRESETS and _same_shapes(manifest, m)]
    # Models of equal shapes, as NVILA's, are told apart by their name.
    model = next((n for n in names if n.casefold() in manifest.name.casefold()), None)
    problem = ""
    if manifest.target != target.name:
        problem = (
            f"{folder} is an engine for {manifest.target}, this table is for {target.name}; "
            f"build it with vila-build-engine --target {target.name}"
        )
    return TableRow(
        model or (names[0] if names else manifest.name), manifest.precision, folder, problem
    )


def _same_shapes(manifest: Manifest, model: str) -> bool:
    def shapes(info: ModelInfo) -> tuple[Any, ...]:
        cache = info.num_layers, info.num_kv_heads, info.head_dim
        image = info.tokens_per_block, info.image.size, info.tiling.mode, info.tiling.scales
        return info.hidden_size, cache, image

    return shapes(manifest.model) == shapes(
        ModelInfo.from_config(preset(model, manifest.precision), None)
    )


@dataclass(frozen=True)
class RowPlan:
    """What a row whose shapes are known takes on `target`; reads no weights."""

    build: ResolvedBuild
    plan: EnginePlan

    @property
    def fits(self) -> bool:
        return self.plan.fits

    @cached_property
    def advice(self) -> str:
        """What would make it fit, such as another backend."""
        build = self.build
        return advise(build.config, build.backend, build.precision, build.request)

    @property
    def max_seq_len(self) -> int:
        return self.build.request.limits.max_seq_len

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads, as the backend keeps them."""
        return weight_bytes_per_step(self.plan.items)

    @property
    def cache_bytes_per_token(self) -> int:
        return self.plan.items[MemoryRow.KV_CACHE].bytes // self.max_seq_len

    @property
    def disk_bytes(self) -> int:
        """Bytes of the engine on disk: all weights, those that are not int4 in float16."""
        return sum(
            int(item.parameters * min(item.bits, 16) / 8)
            for row, item in self.plan.items.items()
            if row not in (MemoryRow.KV_CACHE, MemoryRow.ACTIVATIONS)
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the question about one image, about."""
        return self.build.config.tokens_per_block + 60

    @property
    def prompt_flops(self) -> float:
        """Floating-point operations before the first token: tower and prefill."""
        items, config = self.plan.items, self.build.config
        tiles = sum(max(1, scale // config.tiling.tile) ** 2 for scale in config.tiling.scales)
        vision = items[MemoryRow.VISION].parameters * config.vision.positions * tiles
        prefill = items[MemoryRow.DECODER_LINEARS].parameters * self.prompt_tokens
        return 2.0 * (vision + prefill)


def plan_row(row: TableRow, target: Target) -> RowPlan:
    """Return what `row`, whose shapes are known, takes on `target`.

    Raises:
        VilaDeployError: the target's backend can't build it.
    """
    options = BuildOptions(target.name, max_seq_len=engine_length(row.model))
    build = resolve_random_build(row.model, row.precision, options)
    return RowPlan(build, plan_build(build))


def engine_length(model: str, text_tokens: int = TEXT_TOKENS) -> int:
    """Return the longest sequence of an engine that is built to be measured.

    Args:
        text_tokens: what it holds beside an image: the question and its answer.
    """
    needed = preset(model, "fp16").max_tokens_per_image + text_tokens
    return max(RANDOM_MAX_SEQ_LEN, -(-needed // LENGTH_STEP) * LENGTH_STEP)


def cached_values(info: ModelInfo) -> int:
    """Return how many keys and values a token has in the cache of a running engine."""
    return cache_values_per_token(info.num_layers, info.num_kv_heads, info.head_dim)
