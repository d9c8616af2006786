"""Write the report of a quantization for people, report.md."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from vila_deploy.checkpoint.hub import HubSource
from vila_deploy.formats.base import HEAD_LINEAR
from vila_deploy.formats.registry import FORMATS
from vila_deploy.quantize.report import PREDICTED
from vila_deploy.utils.progress import clock


def markdown(report: dict[str, Any]) -> str:
    """Return report.md: the summary, what stayed float16, and a table of the layers."""
    kind = "symmetric" if report["symmetric"] else "with zero points"
    lines = [
        "# Quantization report",
        "",
        f"- {report['algorithm'].upper()}, {bits_text(report)}, groups of "
        f"{report['group_size']}, {kind}; written as "
        + ", ".join(FORMATS[name].title for name in report["formats"]),
        f"- weights: {_megabytes(report['input_bytes'])} before, "
        f"{_megabytes(report['output_bytes'])} after",
        f"- bits per weight: {report['bits_per_weight']:.3f} in quantized linears, "
        f"{report['bits_per_llm_weight']:.2f} over the whole language model",
        _cost_line(report),
        f"- seed {report['seed']}; parent checkpoint {report['checkpoint_fingerprint'][:16]}"
        + (f", {source}" if (source := HubSource.from_json(report.get("source"))) else ""),
        *_module_lines(report["bit_choice"]),
        *_adapter_lines(report.get("lora")),
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
        *_bits_table(report["bit_choice"]),
        *_relative_error_table(report["evaluation"]),
    ]
    return "\n".join(lines) + "\n"


def bits_text(report: dict[str, Any]) -> str:
    """Return the bits of a quantized value, e.g. "4 bits" or "4 or 8 bits, 4.50 on average"."""
    choice = report["bit_choice"]
    if choice is None:
        return f"{report['bits']} bits"
    widths = sorted({row["bits"] for row in choice["linears"].values()})
    return f"{' or '.join(map(str, widths))} bits, {choice['mean_bits']:.3g} on average"


def _module_lines(choice: dict[str, Any] | None) -> list[str]:
    """Return what the search gave head and vision tower."""
    if choice is None:
        return []
    head: list[int] = []
    tower: list[int] = []
    for name, row in choice["head_and_tower"].items():
        (head if name == HEAD_LINEAR else tower).append(row["bits"])
    counts = ", ".join(f"{tower.count(bits)} in {bits} bits" for bits in sorted({*tower}))
    return [
        *(f"- output head in {bits} bits" for bits in head),
        *([f"- linears of the vision tower: {counts}"] if tower else []),
        *(f"- {name} in float16: {reason}" for name, reason in choice["float16"].items()),
    ]


def _bits_table(choice: dict[str, Any] | None) -> list[str]:
    """Return the bits of each linear and what they were given for."""
    if choice is None:
        return []
    return [
        "",
        "## Bits of each linear",
        "",
        "Where they save the most KL for a bit of storage. In brackets the KL, in 10⁻³ nats per "
        "token, that the linear alone was predicted to cost in its fewest bits, 4 in the LLM's "
        f"layers; all of these together {choice['predicted_kl_4_bits']:.3g} nats in 4 bits, "
        f"{choice['predicted_kl']:.3g} as given. To second order, from gradients and inputs on "
        "calibration data.",
        "",
        *_bits_by_layer(choice["linears"], "predicted_kl_4_bits"),
        *_module_table(choice),
    ]


def _module_table(choice: dict[str, Any]) -> list[str]:
    if not choice["head_and_tower"]:
        return []
    return [
        "",
        "Head and tower, whose fewest bits are 8, were predicted to cost "
        f"{choice['predicted_kl_head_and_tower']:.3g} nats as given.",
        "",
        *_bits_by_layer(choice["head_and_tower"], "predicted_kl_8_bits"),
    ]


def _bits_by_layer(linears: dict[str, dict[str, Any]], first: str) -> list[str]:
    """Return a table with a row for each layer, and one for a linear outside of all layers."""
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    for full, row in linears.items():
        layer, _, name = full.rpartition("layers.")[2].partition(".")
        layers.setdefault(layer, {})[name.rpartition(".")[2]] = row
    inside = [rows for rows in layers.values() if "" not in rows]
    lines = [
        f"{name}: {_bits_cell(rows[''], first)}" for name, rows in layers.items() if "" in rows
    ]
    if not inside:
        return lines
    titles = ["layer", *inside[0]]
    return [
        *lines,
        *([""] if lines else []),
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
        *(
            f"| {layer} | {' | '.join(_bits_cell(row, first) for row in rows.values())} |"
            for layer, rows in layers.items()
            if "" not in rows
        ),
    ]


def _bits_cell(row: dict[str, Any], first: str) -> str:
    return f"{row['bits']} ({1e3 * row[first]:.2g})"


def _cost_line(report: dict[str, Any]) -> str:
    evaluated = report["evaluation_seconds"]
    share = f" ({clock(evaluated)} of it to evaluate)" if evaluated else ""
    return (
        f"- {clock(report['seconds'])} of time{share}, {_megabytes(report['peak_memory_bytes'])} "
        "of memory at the peak, without mapped files "
        f"({_megabytes(report['peak_resident_bytes'])} with them); measured"
    )


def quality_table(evaluation: dict[str, Any]) -> list[str]:
    """Return a table with a row for text, for answers about images, and for both."""
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


def evaluation_note(evaluation: dict[str, Any]) -> str:
    """Return what the figures of `quality_table` were measured on."""
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
    return [*title, *quality_table(evaluation), "", evaluation_note(evaluation), ""]


def _relative_error_table(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return []
    return [
        "",
        "## Relative error of hidden states by modality",
        "",
        "On the evaluation data, behind each layer, errors of all layers up to it together: per "
        "token, square of the difference from the original over square of the original; mean "
        "over the tokens.",
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


def _adapter_lines(lora: dict[str, Any] | None) -> list[str]:
    if lora is None:
        return []
    return [
        f"- LoRA adapter {lora['name']}, rank {lora['rank']}, alpha {lora['alpha']:g}: merged into "
        f"{lora['merged']} tensors, {lora['replaced']} replaced; SHA-256 {lora['sha256'][:16]}"
    ]


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


def _awq_gptq_table(report: dict[str, Any]) -> list[str]:
    names = list(report["layers"][0]["linears"])
    titles = ["layer", "hidden states behind it", *(name.partition(".")[2] for name in names)]
    return [
        "Relative output error (mean square error over mean square, on the calibration data behind "
        "the quantized layers before): round to nearest → as stored, against the weights after "
        "error correction. Hidden states: square of the difference between quantized and original "
        "over the square of the original, mean over the tokens.",
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
    "awq-gptq": _awq_gptq_table,
    "awq": _awq_table,
    "rtn": _rtn_table,
}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
