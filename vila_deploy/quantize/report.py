"""The report of a quantization, for programs (report.json) and for people (report.md)."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import WEIGHT_SUFFIXES
from vila_deploy.eval.fidelity import IMAGE, TEXT, Evaluation
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.quantize.estimate.plan import output_components
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.utils.estimates import MemoryItem
from vila_deploy.utils.progress import clock
from vila_deploy.writers.registry import FORMATS

LIBRARIES = ("vila-deploy", "torch", "transformers", "safetensors")
REASONS = {
    "llm embeddings": "a table that is looked up, not multiplied; AWQ leaves it in float16",
    "llm head": "its error goes straight into every token's probability; AWQ leaves it in float16",
    "llm biases": "vectors that are added; nothing to gain",
    "llm norms": "vectors; they take up the scales of the linears behind them",
    "vision tower": "AWQ quantizes the language model only; copied unchanged",
    "projector": "small, and every image passes through it; copied unchanged",
}

PREDICTED = {TEXT: "text", IMAGE: "answers about images", "all": "both"}


@dataclass(frozen=True)
class Cost:
    """All of a report that may differ between two runs.

    Args:
        seconds: of this run and of the layers that an interrupted one finished.
        evaluation_seconds: the part of `seconds` that the evaluation took.
        peak_memory_bytes: of this run, without the pages of mapped files.
        peak_resident_bytes: of this process, with them.
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
    cost: Cost,
) -> dict[str, Any]:
    """The report of the checkpoint that lies in `out`. Errors are mean squares, relative."""
    readers = (checkpoint.llm, checkpoint.vision, checkpoint.projector)
    input_bytes = sum(file.stat().st_size for reader in readers for file in reader.files())
    files = [file for file in out.rglob("*") if file.suffix in WEIGHT_SUFFIXES]
    output_bytes = sum(file.stat().st_size for file in files)
    components = output_components(checkpoint.config, options.scheme)
    kept = [component for component in components if component.name in REASONS]
    return {
        "algorithm": options.algorithm,
        "formats": list(options.formats),
        "bits": options.scheme.bits,
        "group_size": options.scheme.group_size,
        "symmetric": options.scheme.symmetric,
        "bits_per_weight": options.scheme.bits_per_weight,
        "bits_per_llm_weight": _mean_bits([c for c in components if c.name.startswith("llm")]),
        "seed": options.seed,
        "checkpoint_fingerprint": checkpoint.fingerprint(),
        "input_bytes": input_bytes,
        "output_bytes": output_bytes,
        "components": [vars(component) for component in components],
        "not_quantized": [
            {"name": c.name, "parameters": c.parameters, "reason": REASONS[c.name]} for c in kept
        ],
        "calibration": None if calibration is None else _calibration(calibration),
        "layers": layers,
        "evaluation": None if evaluation is None else evaluation.to_json(),
        "warnings": list(warnings),
        **asdict(cost),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything whose change may change the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _mean_bits(components: list[MemoryItem]) -> float:
    return 8 * sum(c.bytes for c in components) / sum(c.parameters for c in components)


def _calibration(calibration: Calibration) -> dict[str, Any]:
    counts = {k: v for k, v in vars(calibration).items() if k not in ("embeds", "is_image")}
    return {**counts, "sequences": calibration.text_sequences + calibration.image_sequences}


def markdown(report: dict[str, Any]) -> str:
    """report.md: the summary, what stayed float16, and a table of the layers."""
    kind = "symmetric" if report["symmetric"] else "with zero points"
    lines = [
        "# Quantization report",
        "",
        f"- {report['algorithm'].upper()}, {report['bits']} bits, groups of "
        f"{report['group_size']}, {kind}; written as "
        + ", ".join(FORMATS[name].title for name in report["formats"]),
        f"- weights: {_megabytes(report['input_bytes'])} before, "
        f"{_megabytes(report['output_bytes'])} after",
        f"- bits per weight: {report['bits_per_weight']:.3f} in quantized linears, "
        f"{report['bits_per_llm_weight']:.2f} over the whole language model",
        _cost_line(report),
        f"- seed {report['seed']}; parent checkpoint {report['checkpoint_fingerprint'][:16]}",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        *_calibration_lines(report["calibration"]),
        *(f"- **warning**: {warning}" for warning in report["warnings"]),
        "",
        *_quality_lines(report["evaluation"]),
        "## Not quantized",
        "",
        "| part | parameters | reason |",
        "|---|---:|---|",
        *(
            f"| {p['name']} | {p['parameters']:,} | {p['reason']} |"
            for p in report["not_quantized"]
        ),
        "",
        "## Layers",
        "",
        *TABLES[report["algorithm"]](report),
        *_drift_table(report["evaluation"]),
    ]
    return "\n".join(lines) + "\n"


def _cost_line(report: dict[str, Any]) -> str:
    evaluated = report["evaluation_seconds"]
    share = f" ({clock(evaluated)} of it to evaluate)" if evaluated else ""
    return (
        f"- {clock(report['seconds'])} of time{share}, {_megabytes(report['peak_memory_bytes'])} "
        "of memory at the peak, without mapped files "
        f"({_megabytes(report['peak_resident_bytes'])} with them); measured"
    )


def quality_table(evaluation: dict[str, Any]) -> list[str]:
    """Text, answers about images and both, a row each."""
    rows = [
        f"| {title} | {q['tokens']:,} | {q['perplexity_original']:.4g} | {q['perplexity']:.4g} | "
        f"{q['kl_mean']:.4g} | {q['kl_p99']:.3g} | {q['top1_agreement']:.1%} |"
        for name, title in PREDICTED.items()
        if (q := evaluation["quality"][name]) is not None
    ]
    return [
        "| predicted | tokens | perplexity before | after | mean KL | 99th percentile of KL | "
        "top-1 agreement |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
    ]


def evaluation_data(evaluation: dict[str, Any]) -> str:
    """What the figures of `quality_table` were measured on."""
    kind = "the user's own" if evaluation["own_data"] else "the built-in"
    return (
        f"Measured on {kind} evaluation set: {evaluation['sequences']} sequences, "
        f"{evaluation['image_sequences']} of them about {evaluation['images']} images; SHA-256 "
        f"{evaluation['sha256'][:16]}. Both models in float32 arithmetic. KL is "
        "KL(original ‖ quantized) per token, in nats; top-1 agreement is how often both find the "
        "same token most likely."
    )


def _quality_lines(evaluation: dict[str, Any] | None) -> list[str]:
    title = ["## Quality on held-out data", ""]
    if evaluation is None:
        return [*title, "Not evaluated; --eval builtin does it.", ""]
    return [*title, *quality_table(evaluation), "", evaluation_data(evaluation), ""]


def _drift_table(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return []
    return [
        "",
        "## Drift by modality",
        "",
        "How far the hidden states behind each layer are from the original's on the evaluation "
        "data, errors of all layers up to it together: per token, square of the difference over "
        "square of the original; mean over the tokens.",
        "",
        "| layer | text tokens | image tokens |",
        "|---|---:|---:|",
        *(
            f"| {e['layer']} | {_figure(e['text_error'])} | {_figure(e['image_error'])} |"
            for e in evaluation["layers"]
        ),
    ]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _calibration_lines(calibration: dict[str, Any] | None) -> list[str]:
    if calibration is None:
        return ["- calibration: none needed"]
    return [
        f"- calibration: {calibration['text_sequences']} text sequences and "
        f"{calibration['image_sequences']} about {calibration['images']} images, "
        f"{calibration['tokens']:,} tokens of which {calibration['image_tokens']:,} are image "
        f"tokens; SHA-256 {calibration['sha256'][:16]}"
    ]


def _awq_table(report: dict[str, Any]) -> list[str]:
    names = list(report["layers"][0]["linears"])
    after = [layer["output_error_after"] for layer in report["layers"]]
    before = [layer["output_error_before"] for layer in report["layers"]]
    rows = []
    for layer in report["layers"]:
        cells = [_errors(layer), *(_errors(layer["linears"][name]) for name in names)]
        chosen = " ".join(f"{ratio:.2f}" for ratio in layer["scale_ratios"].values())
        rows.append(f"| {layer['layer']} | {' | '.join(cells)} | {chosen} |")
    titles = ["layer", "whole layer", *(name.partition(".")[2] for name in names), "scale ratios"]
    return [
        "Relative output error (mean square error over mean square, on the calibration data): "
        "round to nearest → AWQ. A whole layer's is relative to what it adds to its input.",
        "",
        f"Median over layers: {median(before):.3g} → {median(after):.3g}.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
        *rows,
    ]


def _compensated_table(report: dict[str, Any]) -> list[str]:
    names = list(report["layers"][0]["linears"])
    titles = ["layer", "drift behind it", *(name.partition(".")[2] for name in names)]
    return [
        "Relative output error (mean square error over mean square, on the calibration data behind "
        "the quantized layers before): round to nearest → as stored, against the weights wanted. "
        "Drift: square of the difference between quantized and exact hidden state over the square "
        "of the exact one, mean over the tokens.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
        *(
            f"| {layer['layer']} | {layer['drift']:.2g} | "
            + " | ".join(_errors(layer["linears"][name]) for name in names)
            + " |"
            for layer in report["layers"]
        ),
    ]


def _rtn_table(report: dict[str, Any]) -> list[str]:
    names = list(report["layers"][0]["linears"])
    titles = ["layer", *(name.partition(".")[2] for name in names)]
    return [
        "Relative error of the weights (mean square error over mean square).",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
        *(
            f"| {layer['layer']} | "
            + " | ".join(f"{layer['linears'][name]['weight_error']:.3g}" for name in names)
            + " |"
            for layer in report["layers"]
        ),
    ]


def _errors(entry: dict[str, Any]) -> str:
    return f"{entry['output_error_before']:.2g} → {entry['output_error_after']:.2g}"


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "awq-gptq": _compensated_table,
    "awq": _awq_table,
    "rtn": _rtn_table,
}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
