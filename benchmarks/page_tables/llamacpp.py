"""GGUF files and backend llamacpp beside llama.cpp's own programs."""

from __future__ import annotations

from statistics import median

from benchmarks.page_tables.accuracy import TEXTS
from benchmarks.page_tables.sources import Row, markdown, results

FILES = {
    "F16": "F16: the unquantized checkpoint",
    "Q4_0": "llama-quantize Q4_0",
    "Q4_K_M": "llama-quantize Q4_K_M",
    "awq-64": "**vila-quantize**, awq, groups of 64",
    "awq-gptq-64": "**vila-quantize**, awq-gptq, groups of 64",
    "awq-gptq-32-symmetric": "**vila-quantize**, awq-gptq, groups of 32, `--symmetric`",
}
PROGRAMS = {
    ("vila-deploy", "flash"): "backend llamacpp, flash attention",
    ("vila-deploy", "plain"): "backend llamacpp, plain attention",
    ("llama-batched-bench", None): "llama-batched-bench",
}


def llamacpp_accuracy() -> str:
    """Return KL and perplexity of each GGUF file in llama.cpp, on both texts."""
    table = []
    for name, title in FILES.items():
        pair = [
            row
            for text in TEXTS
            for row in _rows()
            if (row["candidate"], row["text"]) == (name, text)
        ]
        if not pair:
            continue
        cells = [title, _types(pair[0]), f"{pair[0]['linear_bits']:.2f}"]
        cells.append(f"{pair[0]['file_bytes'] / 1e6:.0f} MB")
        for row in pair:
            cells += [f"{row['kl_mean']:.4f}", f"{row['perplexity']:.2f}"]
        table.append(cells)
    titles = ["file", "linears", "bits", "size", "KL", "perplexity"]
    first = _rows()[0]
    program = f"llama-cpp-python {first['versions']['llama-cpp-python']}"
    note = (
        f"{first['label']} in llama.cpp ({program}) on "
        f"{first['device']}, {first['tokens']:,} tokens of each text; float32's perplexity is "
        f"{_float32('topics'):.2f} and {_float32('source'):.2f}."
    )
    return markdown([*titles, *(f"source code: {title}" for title in titles[-2:])], table, note)


def llamacpp_arithmetic() -> str:
    """Return what llama.cpp's arithmetic adds to that of the same weights in float32."""
    table = []
    for row in _rows():
        if "from_float32" not in row:
            continue
        own, engine = row["float32"]["perplexity"], row["from_cpu_engine"]["fp32_perplexity"]
        found = row["perplexity"]
        cells = [f"{FILES[row['candidate']].replace('**', '')}; {TEXTS[row['text']]}"]
        cells += [_difference(found, own), _difference(found, engine)]
        kinds = ("from_float32", "F32_from_float32", "Q5_0_from_float32", "from_cpu_engine")
        cells += [_scientific(row[kind]["kl_mean"]) if kind in row else "" for kind in kinds]
        table.append(cells)
    titles = [
        "weights; text", "perplexity beside float32", "beside our CPU engine",
        "KL from float32: as written", "as F32", "as Q5_0", "KL from our CPU engine",
    ]  # fmt: skip
    return markdown(titles, table)


def llamacpp_slots() -> str:
    """Return the tokens a second of several sequences in each program."""
    rows = results("llamacpp-slots")
    table = []
    for (what, attention), title in PROGRAMS.items():
        speeds = [
            row["tokens_per_s"]
            for row in rows
            if (row["what"], row.get("attention")) == (what, attention)
        ]
        table.append([title, f"{median(speeds):.1f}", f"{min(speeds):.1f} – {max(speeds):.1f}"])
    first = rows[0]
    note = (
        f"{first['label']} on {first['device']}: {first['model']}'s shapes, {first['slots']} "
        f"sequences, {len(speeds)} rounds in turns; the computer's own speed varied."
    )
    return markdown(["", "tokens a second", "slowest and fastest round"], table, note)


def _rows() -> tuple[Row, ...]:
    return results("llamacpp-accuracy")


def _float32(text: str) -> float:
    return next(row["fp32_perplexity"] for row in _rows() if row["text"] == text)


def _types(row: Row) -> str:
    total = sum(row["linear_types"].values())
    return ", ".join(
        kind if count == total else f"{kind} {count}" for kind, count in row["linear_types"].items()
    )


def _difference(found: float, expected: float) -> str:
    return f"{found / expected - 1:+.2%}"


def _scientific(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"
