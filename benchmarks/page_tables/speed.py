"""Measured speed beside what the authors of VILA publish."""

from __future__ import annotations

from benchmarks.page_tables import sources
from benchmarks.page_tables.sources import PRECISIONS, Row, markdown, measured_on_cpu, results
from vila_deploy.bench.published import published_models, read_published
from vila_deploy.bench.table_markdown import decode_table, first_token_table, notes

GPUS = {"a100": "A100", "rtx4090": "RTX 4090", "orin": "Jetson AGX Orin"}


SHORT = ("VILA1.5-3b", "Llama-3-VILA1.5-8B", "VILA1.5-13b", "VILA1.5-40b", "NVILA-8B")


def speed() -> str:
    """Return decode tokens/s of five models, int4 (fp16): measured, then published."""
    measured = measured_on_cpu()
    speeds = {
        (row["model"], row["precision"]): "out of memory"
        for row in results(sources.CPU_TABLE)
        if row["label"] == "oom"
    }
    speeds |= {key: _tokens_per_s(row) for key, row in measured.items()}
    first = next(iter(measured.values()))
    device = f"{first['device']}, {first['state']['cores']} cores"
    rows = [["vila-deploy", device, first["label"], *_pairs(speeds)]]
    for gpu, title in GPUS.items():
        rows.append(["TinyChat, by VILA's authors", title, "published", *_pairs(_published(gpu))])
    shares = [row["roofline_fraction"] for key, row in measured.items() if key[1] == "int4"]
    note = (
        f"Measured with these models' shapes and {first['weights']} weights behind one image; int4 "
        f"uses {min(shares):.0%} to {max(shares):.0%} of that computer's read bandwidth."
    )
    return markdown(["", "device", "figures are", *SHORT], rows, note)


def _tokens_per_s(row: Row) -> str:
    speed = row["decode"]["image"]["tokens_per_s"]
    return f"{speed:.2f}" if speed < 10 else f"{speed:.1f}"


def _pairs(speeds: dict[tuple[str, str], str]) -> list[str]:
    """Return `int4 (fp16)` for each model of SHORT, a dash where neither is known."""
    cells = []
    for model in SHORT:
        int4, fp16 = (speeds.get((model, precision), "–") for precision in PRECISIONS)
        cells.append(int4 if int4 == fp16 else f"{int4} ({fp16})")
    return cells


def _published(gpu: str) -> dict[tuple[str, str], str]:
    return {
        (row["model"], row["precision"]): row["decode_tokens_per_s"]
        for row in read_published("speed")
        if row["target"] == gpu
    }


def published_speed() -> str:
    """Return all of the authors' decode speeds."""
    tables = [_published(gpu) for gpu in GPUS]
    names = dict.fromkeys(row["model"] for row in read_published("speed"))
    rows = [
        [name, precision, *(table.get((name, precision), "") for table in tables)]
        for name in names
        for precision in PRECISIONS
    ]
    return markdown(["model", "precision", *GPUS.values()], rows)


def speed_cpu() -> str:
    """Return what a decoding step reads and how near it comes to the host's bandwidth."""
    measured = sorted(measured_on_cpu().values(), key=lambda row: (row["model"], row["precision"]))
    rows = [
        [
            row["model"],
            row["precision"],
            _tokens_per_s(row),
            f"{row['weight_bytes_per_token'] / 1e9:.2f} GB",
            f"{row['read_bandwidth_bytes_per_s'] / 1e9:.1f} GB/s",
            f"{row['roofline_fraction']:.0%}",
            f"{row['ttft_ms']['total'] / 1e3:.1f} s",
            f"{row['peak_memory_bytes'] / 1e9:.1f} GB",
        ]
        for row in measured
    ]
    first = measured[0]
    note = (
        f"measured: {first['weights']} weights, batch 1, {first['prompt_tokens']} tokens of prompt "
        f"with one image, {first['device']}, {first['state']['cores']} cores, "
        f"onnxruntime {first['versions']['onnxruntime']}"
    )
    titles = ["model", "precision", "tokens/s", "weights read a token", "read bandwidth then"]
    return markdown([*titles, "share of it", "first token", "peak memory"], rows, note)


def authors_table() -> str:
    """Return the tables of every committed run of `vila-bench --table`."""
    names = sorted(path.stem for path in sources.RESULTS.glob("authors-table-*.jsonl"))
    if not names:
        return "No run has been committed yet.\n"
    parts = []
    models = published_models()
    for name in names:
        # A later row of a model takes the place of an earlier one, as when the command goes on.
        last = {(row["model"], row["precision"]): row for row in results(name)}
        known = [key for key in last if key[0] in models]
        rows = [last[key] for key in sorted(known, key=lambda key: (models.index(key[0]), key[1]))]
        title = f"### {results(name)[0]['device']}"
        parts += [title, decode_table(rows), first_token_table(rows), notes(rows)]
    return "\n\n".join(parts) + "\n"


def published_ttft() -> str:
    """Return the authors' times to first token for NVILA."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in read_published("speed"):
        if row["ttft_s"]:
            key = f"{row['model']}, {row['task']}", row["precision"]
            rows.setdefault(key, {})[row["target"]] = row["ttft_s"]
    body = [[*key, *(times[gpu] for gpu in GPUS)] for key, times in rows.items()]
    return markdown(["model, task", "precision", *GPUS.values()], body)


def published_accuracy() -> str:
    """Return the authors' benchmark scores in fp16 and int4."""
    scores: dict[tuple[str, str], dict[str, str]] = {}
    for row in read_published("accuracy"):
        scores.setdefault((row["model"], row["precision"]), {})[row["benchmark"]] = row["score"]
    benchmarks = list(next(iter(scores.values())))
    body = [[*key, *(row[name] for name in benchmarks)] for key, row in scores.items()]
    return markdown(["model", "precision", *benchmarks], body)
