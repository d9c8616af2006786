"""Build the report of a quantization, report.json."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import WEIGHT_SUFFIXES
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.hub import hub_source
from vila_deploy.checkpoint.lora import Adapter
from vila_deploy.checkpoint.tensor_schema import tower_linears
from vila_deploy.engine.memory import Items, MemoryRow
from vila_deploy.eval.fidelity import IMAGE, TEXT, Evaluation
from vila_deploy.formats.base import HEAD_LINEAR, SYMMETRIC_BITS
from vila_deploy.quantize.bit_choice import FLOAT16_BITS, BitChoice
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.quantize.estimate.plan import LLM_ROWS, output_items
from vila_deploy.quantize.options import LM_HEAD, VISION, QuantizeOptions
from vila_deploy.utils.estimates import MemoryItem

LIBRARIES = ("vila-deploy", "torch", "transformers", "safetensors")
REASONS = {
    MemoryRow.EMBEDDINGS: "a table that is looked up, not multiplied; AWQ leaves it in float16",
    MemoryRow.HEAD: (
        "its error goes straight into every token's probability; AWQ leaves it in float16"
    ),
    MemoryRow.BIASES: "vectors that are added; nothing to gain",
    MemoryRow.NORMS: "vectors; they take up the scales of the linears behind them",
    MemoryRow.VISION: "AWQ quantizes the language model only; copied unchanged",
    MemoryRow.PROJECTOR: "small, and every image passes through it; copied unchanged",
}

# What is predicted, by the keys of an evaluation's quality.
PREDICTED = {TEXT: "text", IMAGE: "answers about images", "all": "both"}


@dataclass(frozen=True)
class RunCost:
    """Time and memory of a run: the only part of a report that may differ between two runs.

    Args:
        seconds: of this run, and of the layers that an interrupted one finished.
        evaluation_seconds: the part of `seconds` that the evaluation took.
        peak_memory_bytes: of this run, without the pages of mapped files.
        peak_resident_bytes: of this process, with the pages of mapped files.
        device: "cpu" or "cuda".
    """

    seconds: float
    evaluation_seconds: float
    peak_memory_bytes: int
    peak_resident_bytes: int
    device: str


def build_report(
    checkpoint: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    calibration: Calibration | None,
    layers: list[dict[str, Any]],
    evaluation: Evaluation | None,
    warnings: Sequence[str],
    cost: RunCost,
    adapter: Adapter | None = None,
    choice: BitChoice | None = None,
) -> dict[str, Any]:
    """Return the report of the checkpoint in `out`; errors are relative mean squares."""
    readers = (checkpoint.llm, checkpoint.vision, checkpoint.projector)
    input_bytes = sum(file.stat().st_size for reader in readers for file in reader.files())
    files = [file for file in out.rglob("*") if file.suffix in WEIGHT_SUFFIXES]
    output_bytes = sum(file.stat().st_size for file in files)
    int8 = () if choice is None else choice.int8_tower_linears
    items = output_items(checkpoint.config, options.scheme, int8_tower_linears=int8)
    source = hub_source(checkpoint.root)
    llm_items = [item for row, item in items.items() if row in LLM_ROWS]
    return {
        "algorithm": options.algorithm,
        "formats": list(options.formats),
        "bits": options.scheme.bits,
        "group_size": options.scheme.group_size,
        "symmetric": options.scheme.symmetric,
        "bits_per_weight": items[MemoryRow.DECODER_LINEARS].bits,
        "bit_choice": None if choice is None else choice.to_json(),
        "bits_per_llm_weight": _mean_bits(llm_items),
        "seed": options.seed,
        "checkpoint_fingerprint": checkpoint.fingerprint(),
        "source": source.to_json() if source else None,
        "lora": None if adapter is None else adapter.to_json(),
        "input_bytes": input_bytes,
        "output_bytes": output_bytes,
        "components": [vars(item) for item in items.values()],
        "not_quantized": _not_quantized(checkpoint.config, items, choice),
        "calibration": None if calibration is None else _calibration(calibration),
        "layers": layers,
        "evaluation": None if evaluation is None else evaluation.to_json(),
        "warnings": list(warnings),
        **asdict(cost),
        "versions": versions(),
    }


def _not_quantized(
    config: VilaConfig, items: Items, choice: BitChoice | None
) -> list[dict[str, Any]]:
    """Return what stays in float16, with the reason."""
    reasons = dict(REASONS)
    float16 = {row: item.parameters for row, item in items.items()}
    if choice is not None:
        for module, row in ((LM_HEAD, MemoryRow.HEAD), (VISION, MemoryRow.VISION)):
            reasons[row] = choice.float16.get(module, f"the search gave it {FLOAT16_BITS} bits")
        if choice.module_bits.get(HEAD_LINEAR) == SYMMETRIC_BITS:
            del reasons[MemoryRow.HEAD]
        shapes, int8 = tower_linears(config), choice.int8_tower_linears
        if int8:
            kept = len(shapes) - len(int8)
            linears = f" and {kept} of {len(shapes)} linears" if kept else ""
            reasons[MemoryRow.VISION] = f"embeddings, norms, biases{linears}; the rest is in int8"
            float16[MemoryRow.VISION] -= sum(math.prod(shapes[name]) for name in int8)
    return [
        {"name": item.name, "parameters": float16[row], "reason": reasons[row]}
        for row, item in items.items()
        if row in reasons
    ]


def versions() -> dict[str, str]:
    """Return the versions of everything that may change the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _mean_bits(items: list[MemoryItem]) -> float:
    return 8 * sum(item.bytes for item in items) / sum(item.parameters for item in items)


def _calibration(calibration: Calibration) -> dict[str, Any]:
    left_out = ("embeds", "is_image", "images_of")
    counts = {k: v for k, v in vars(calibration).items() if k not in left_out}
    return {**counts, "sequences": calibration.text_sequences + calibration.image_sequences}


def worst_kl(evaluation: dict[str, Any]) -> tuple[str, float]:
    """Return the larger mean KL of text and of answers about images, and which of them it is."""
    by_kind = {k: q["kl_mean"] for k, q in evaluation["quality"].items() if q and k != "all"}
    return max(by_kind.items(), key=lambda pair: (math.isnan(pair[1]), pair[1]))
