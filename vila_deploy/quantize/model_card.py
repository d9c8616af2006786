"""Write the model card of a quantized checkpoint: README.md with the Hub's front matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.hub import hub_source
from vila_deploy.checkpoint.licence import original_licence
from vila_deploy.quantize.report_markdown import bits_text, evaluation_note, quality_table


def model_card(checkpoint: Checkpoint, report: dict[str, Any]) -> str:
    """Return README.md of the checkpoint that `checkpoint` was quantized to, described by `report`.

    The licence is that of the original's card; without one the user has to add it.
    """
    llm = checkpoint.config.llm
    kind = "symmetric" if report["symmetric"] else "with zero points"
    lines = [
        *_front_matter(checkpoint, report),
        "# VILA with a 4-bit language model",
        "",
        f"The language model of a VILA checkpoint ({llm.family.name}, {llm.num_layers} layers, "
        f"hidden size {llm.hidden_size}), quantized with vila-deploy: "
        f"{report['algorithm'].upper()}, {bits_text(report)}, groups of {report['group_size']}, "
        f"{kind}. Not quantized: {', '.join(part['name'] for part in report['not_quantized'])}.",
        "",
        "| | |",
        "|---|---|",
        f"| weights | {report['input_bytes'] / 1e9:.2f} GB before, "
        f"{report['output_bytes'] / 1e9:.2f} GB now |",
        f"| bits per weight | {report['bits_per_weight']:.3f} in quantized linears, "
        f"{report['bits_per_llm_weight']:.2f} over the whole language model |",
        f"| made from | {_origin(checkpoint.root)}checkpoint with fingerprint "
        f"{report['checkpoint_fingerprint'][:16]} |",
        *_adapter_row(report.get("lora")),
        f"| calibration | {_calibration(report['calibration'])} |",
        "",
        "## How to run it",
        "",
        "Where FOLDER is the folder of this file:",
        "",
        "```console",
        "$ vila-build-engine FOLDER --target cpu -o ENGINE",
        '$ vila-chat ENGINE --image cat.jpg -p "What is in the image?"',
        "```",
        "",
        "## Quality",
        "",
        *_quality(report["evaluation"]),
        *(line for text in report["warnings"] for line in ("", f"**Warning**: {text}.")),
    ]
    return "\n".join(lines) + "\n"


def _adapter_row(lora: dict[str, Any] | None) -> list[str]:
    if lora is None:
        return []
    name = lora["name"].replace("`", "'").replace("|", r"\|")
    return [
        f"| LoRA adapter | `{name}`, rank {lora['rank']}, merged into {lora['merged']} "
        f"tensors, {lora['replaced']} replaced; SHA-256 {lora['sha256'][:16]} |"
    ]


def _front_matter(checkpoint: Checkpoint, report: dict[str, Any]) -> list[str]:
    licence = original_licence(checkpoint.root)
    source = hub_source(checkpoint.root)
    base = source and source.repository
    return [
        "---",
        *([f"base_model: {base}", "base_model_relation: quantized"] if base else []),
        *(f"{key}: {value}" for key, value in licence.items()),
        "pipeline_tag: image-text-to-text",
        "tags:",
        *(f"- {tag}" for tag in ("vila", "vila-deploy", report["algorithm"], "4-bit", "int4")),
        "---",
        "",
    ]


def _origin(root: Path) -> str:
    source = hub_source(root)
    return f"{source}, " if source else ""


def _calibration(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "none needed"
    return (
        f"{calibration['tokens']:,} tokens in {calibration['sequences']} sequences, "
        f"{calibration['image_sequences']} of them about {calibration['images']} images"
    )


def _quality(evaluation: dict[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["Not evaluated."]
    return [*quality_table(evaluation), "", evaluation_note(evaluation)]
