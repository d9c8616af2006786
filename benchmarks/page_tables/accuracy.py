"""What quantization changes in a model's predictions."""

from __future__ import annotations

import math
from functools import cache

from benchmarks.page_tables.sources import (
    PRECISIONS,
    Row,
    markdown,
    measured_on_cpu,
    results,
)

BASELINES = {
    "rtn": "RTN",
    "autoawq": "AutoAWQ 0.2.9",
    "llmawq": "llm-awq's algorithm",
    "vila-deploy-awq": "llm-awq's algorithm (`--algorithm awq`)",
    "llmcompressor-awq": "llm-compressor 0.14 AWQ",
    "llmcompressor-gptq": "llm-compressor 0.14 GPTQ",
    "llmcompressor-awq-gptq": "llm-compressor 0.14 AWQ, then GPTQ",
    "autoround-light": "AutoRound 0.16, light recipe (50 steps)",
    "autoround": "AutoRound 0.16, default (200 steps)",
    "modelopt-awq-lite": "Model Optimizer 0.47 awq_lite",
    "modelopt-awq-full": "Model Optimizer 0.47 awq_full",
    "vila-deploy-awq-gptq": "**vila-quantize**",
}
TEXTS = {"topics": "docstring corpus", "source": "source code"}


HEADLINE = (False, "topics")


@cache
def _candidates() -> dict[tuple[str, bool, str], Row]:
    """Return the rows by candidate, symmetric, text; later rows win.

    Rows on another processor are left out, but for today's rounding, measured there alone.
    """
    rows = (*results("quantization-smollm2-earlier"), *results("quantization-smollm2"))
    found = {}
    for row in rows:
        name = row["candidate"].removesuffix("-asym").removesuffix("-sym")
        if "instructions" not in row or "rounding" in row:
            found[name, row["symmetric"], row["text"]] = row
    return found


def accuracy() -> str:
    """Return five rows for README: fp32, RTN, two baselines, vila-quantize."""
    chosen = ("rtn", "autoawq", "llmcompressor-awq-gptq", "vila-deploy-awq-gptq")
    rows = [["fp32", f"{_fp32('topics'):.2f}", "0", "100%"]]
    rows += [_accuracy_cells(name, _candidates()[name, False, "topics"]) for name in chosen]
    exact = {row["quantization"]: row["exact_match"] for row in _tiny_vila_rows()}
    note = (
        f"tiny-vila answers {exact['awq-gptq']:.1%} of 500 held-out questions about images exactly "
        f"in int4, {exact['fp32']:.1%} in fp32."
    )
    titles = ["int4, groups of 64", "perplexity", "mean KL", "top-1 agreement"]
    return markdown(titles, rows, note)


def accuracy_baselines() -> str:
    """Return every candidate on both texts, asymmetric and symmetric."""
    rows = [
        ["fp32", "", f"{_fp32('topics'):.2f}", "", "", "", f"{_fp32('source'):.2f}", "", "", ""]
    ]
    for symmetric in (False, True):
        for name, title in BASELINES.items():
            pair = [_candidates().get((name, symmetric, text)) for text in TEXTS]
            if pair[0] is None or pair[1] is None:
                continue
            cells = [title + (" ¹" if "note" in pair[0] else ""), "yes" if symmetric else "no"]
            for row in pair:
                assert row is not None
                cells += [*_accuracy_cells(name, row)[1:], _recovered(row)]
            rows.append(cells)
    columns = ["perplexity", "KL", "top-1", "recovered"]
    titles = ["", "symmetric", *columns, *(f"source code: {column}" for column in columns)]
    return markdown(titles, rows)


def _accuracy_cells(name: str, row: Row) -> list[str]:
    mark = "**" if name == "vila-deploy-awq-gptq" else ""
    figures = f"{row['perplexity']:.2f}", f"{row['kl_mean']:.3f}", f"{row['top1']:.1%}"
    return [BASELINES[name], *(f"{mark}{figure}{mark}" for figure in figures)]


def _fp32(text: str) -> float:
    return next(iter(r for r in results("quantization-smollm2") if r["text"] == text))[
        "fp32_perplexity"
    ]


def _recovered(row: Row) -> str:
    """Return the share of RTN's loss in log-perplexity that a candidate makes up for."""
    rtn = _candidates()["rtn", row["symmetric"], row["text"]]
    if row is rtn:
        return ""
    loss = math.log(rtn["perplexity"]) - math.log(row["perplexity"])
    return f"{loss / math.log(rtn['perplexity'] / row['fp32_perplexity']):.0%}"


def accuracy_processors() -> str:
    """Return vila-quantize's figures by the processor's vector instructions."""
    rows = [
        [
            row.get("instructions", "AVX2"),
            "yes" if row["symmetric"] else "no",
            TEXTS[row["text"]],
            f"{row['perplexity']:.2f}",
            f"{row['kl_mean']:.3f}",
        ]
        for row in results("quantization-smollm2")
        if row["candidate"].startswith("vila-deploy-awq-gptq") and "rounding" not in row
    ]
    return markdown(["instructions", "symmetric", "text", "perplexity", "mean KL"], rows)


def ablation_kl() -> str:
    """Return the KL that each step of awq-gptq leaves."""
    rows = [
        [_step(row), f"{row['kl_topics']:.3f}", f"{row['kl_source']:.3f}"]
        for row in results("quantization-ablation")
        if "kl_topics" in row
    ]
    return markdown(["", "KL, docstring corpus", "KL, source code"], rows)


def ablation_error() -> str:
    """Return the output error that each step leaves in each kind of linear."""
    kinds = {"qkv": "q, k, v", "o": "o", "gate_up": "gate, up", "down": "down"}
    rows = [
        [_step(row), *(" / ".join(f"{x:.2f}" for x in row[kind] or ()) for kind in kinds)]
        for row in results("quantization-ablation")
        if "down" in row
    ]
    return markdown(["", *kinds.values()], rows)


def rounding_kl() -> str:
    """Return the KL before and after the last change of awq-gptq's rounding."""
    rows = [
        [r["model"], r["data"], f"{r['before']:.4f}", f"{r['after']:.4f}"]
        for r in results("quantization-rounding")
        if "before" in r
    ]
    return markdown(["", "data", "KL before", "after"], rows)


def rounding_ideas() -> str:
    """Return the error of rounded weights that each idea left, over that before."""
    kinds = ("q", "k", "v", "o", "gate", "up", "down")
    rows = []
    for row in results("quantization-rounding"):
        if "errors" in row:
            errors = [f"{row['errors'][k]:.2f}" if k in row["errors"] else "" for k in kinds]
            rows.append([_step(row), row["weighted"], str(row["layer"]), *errors])
    return markdown(["", "weighted", "layer", *kinds], rows)


def mixed_bits() -> str:
    """Return the KL of linears in several numbers of bits, and its share of that of 4 bits."""
    mixes = list(dict.fromkeys(row["mix"] for row in results("quantization-mixed-bits")))
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in results("quantization-mixed-bits"):
        algorithm = f"`{row['algorithm']}`" + ", symmetric" * row["symmetric"]
        for data, kl in row["kl"].items():
            found.setdefault((row["model"], algorithm, data), {})[row["mix"]] = kl
    rows = [
        [*names, *(_share(kl.get(mix), kl[mixes[0]]) for mix in mixes)]
        for names, kl in found.items()
    ]
    return markdown(["", "algorithm", "data", *mixes], rows)


def _share(kl: float | None, of: float) -> str:
    if kl is None:
        return ""
    return f"{kl:.3g}" if kl == of else f"{kl:.3g} ({kl / of:.2f})"


def _step(row: Row) -> str:
    return f"*rejected:* {row['step']}" if row["rejected"] else row["step"]


def _tiny_vila_rows(*compared: str) -> list[Row]:
    """Return the rows of the first processor: fp32, RTN, images and `compared` as calibration."""
    rows = results("tiny-vila-quantization")
    shown = ("none", "pictures", *compared)
    return [
        row
        for row in rows
        if row["commit"] == rows[0]["commit"] and row.get("calibration", "none") in shown
    ]


def tiny_vila() -> str:
    """Return tiny-vila's exact answers by calibration data, on the first processor measured."""
    rows = []
    calibrated = {"pictures": "text and images", "text only": "text alone", "none": ""}
    for row in _tiny_vila_rows("text only"):
        quality = row.get("quality", {})
        name = {"rtn": "RTN", "fp32": "fp32"}.get(row["quantization"], row["quantization"])
        kl = f"{quality['kl_mean']:.5f}" if quality else "0"
        top1 = f"{quality['top1_agreement']:.1%}" if quality else "100%"
        cells = [name, calibrated[row.get("calibration", "none")], f"{row['exact_match']:.1%}"]
        rows.append([*cells, kl, top1])
    titles = ["", "calibrated on", "exact answers", "mean KL on answers", "top-1 agreement"]
    return markdown(titles, rows)


def tiny_vila_kinds() -> str:
    """Return tiny-vila's exact answers by kind of question."""
    names = {"fp32": "fp32", "awq-gptq": "int4, vila-quantize", "rtn": "int4, RTN"}
    kinds = list(results("tiny-vila-quantization")[0]["by_kind"])
    rows = [
        [names[row["quantization"]], f"{row['exact_match']:.1%}"]
        + [f"{row['by_kind'][kind]:.0%}" for kind in kinds]
        for row in _tiny_vila_rows()
    ]
    return markdown(["", "all", *kinds], rows)


def headline() -> str:
    """Return README's sentence about what has been measured so far."""
    measured = measured_on_cpu()
    int4, fp16 = (
        measured["VILA1.5-3b", precision]["decode"]["image"]["tokens_per_s"]
        for precision in PRECISIONS
    )
    kl = {key[0]: row["kl_mean"] for key, row in _candidates().items() if key[1:] == HEADLINE}
    others = (
        f"RTN {kl['rtn']:.3f}, AutoAWQ {kl['autoawq']:.3f}, "
        f"llm-compressor's AWQ, then GPTQ {kl['llmcompressor-awq-gptq']:.3f}"
    )
    return (
        f"**Measured**: on two CPU cores VILA1.5-3b's shapes (random weights) decode "
        f"{int4:.1f} tokens/s in int4,\n{fp16:.1f} in fp16. "
        f"SmolLM2-135M in int4 is a mean KL of {kl['vila-deploy-awq-gptq']:.3f} from fp32\n"
        f"({others}).\n"
    )


def module_precision() -> str:
    """Return what int8 and int4 heads and an int8 tower change in the logits."""
    names = {"lm_head": "head", "vision": "tower"}
    rows = [
        [
            row["model"],
            f"{names[row['component']]} {row['kept_as']}",
            f"{row['kl_mean']:.2g}",
            f"{row['top1_agreement']:.1%}",
        ]
        for row in results("components")
        if "kl_mean" in row
    ]
    return markdown(["checkpoint", "changed", "mean KL, nats", "top-1 agreement"], rows)
