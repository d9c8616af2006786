"""Choices of the CPU engine: what activations, cache and head cost, and what they save."""

from __future__ import annotations

from benchmarks.page_tables.sources import Row, markdown, results
from vila_deploy.bench import baselines
from vila_deploy.bench.baselines import comparison_cells

FIGURES = {
    "vision_s": "vision encoder, one tile",
    **baselines.FIGURES,
    "load_s": "load",
    "loaded_bytes": "resident after load",
    "end_bytes": "at the end",
}


def cpu_choices() -> str:
    """Return what int8 activations, cache and head add to what 4 bits cost."""
    rows = []
    for row in results("cpu-choices"):
        if "kl_mean" in row:
            added = f"{row['kl_added_share']:+.1%}" if row["kl_added_share"] else ""
            figures = [f"{row['perplexity']:.3f}", f"{row['kl_mean']:.5f}", added]
            name = f"{row['text']}, {row['tokens']:,} tokens"
            rows.append([name, *_choice(row, cache=True), *figures])
    note = _note(results("cpu-choices")[0])
    return markdown(
        [
            "text",
            "`--activations`",
            "`--kv-cache`",
            "`--lm-head`",
            "perplexity",
            "KL to fp32",
            "added",
        ],
        rows,
        note,
    )


def cpu_choices_answers() -> str:
    """Return how many of tiny-vila's answers are exact with each choice."""
    rows = [
        [row["model"], *_choice(row), row.get("vision", "fp16"), f"{row['exact_match']:.1%}"]
        for row in results("cpu-choices")
        if "exact_match" in row
    ]
    header = ["model", "`--activations`", "`--lm-head`", "`--vision`", "exact answers of 500"]
    return markdown(header, rows)


def cpu_engine() -> str:
    """Return the figures of default engines as shares of those with int8x2 and an fp16 head."""
    engines = [row for row in results("cpu-engine") if row["activations"] == "int8"]
    rows = [
        [title, *(f"{row['ratio_to_first'][name]:.2f}" for row in engines)]
        for name, title in FIGURES.items()
    ]
    note = f"{_note(engines[0])}; {engines[0]['note']}"
    return markdown(["", *(row["model"] for row in engines)], rows, note)


def cpu_llamacpp() -> str:
    """Return our engine's figures and llama.cpp's, each at its better setting of a round."""
    rows = results("cpu-llamacpp")
    table = [[label, *comparison_cells(rows, name)] for name, label in baselines.FIGURES.items()]
    rounds = len({row["round"] for row in rows})
    return markdown(
        ["VILA1.5-3b's language model", "vila-deploy", "llama.cpp", "times as fast"],
        table,
        f"{_note(rows[0])}, {rows[0]['threads']} threads, {rounds} rounds; {rows[0]['note']}",
    )


def _choice(row: Row, cache: bool = False) -> list[str]:
    terms = row.get("lm_head_terms", 0)
    head = f"{row['lm_head']}, {terms} terms" if terms == 2 else row["lm_head"]
    return [row["activations"], *([row.get("kv_cache", "fp16")] if cache else []), head]


def _note(row: Row) -> str:
    return f"{row['label']} on {row['device']}"
