"""What a server does with several clients at once."""

from __future__ import annotations

from typing import Any

from benchmarks.page_tables.sources import markdown, results

DATA = {
    "text": "text",
    "shared-prefix": "prompts that begin alike",
    "image": "an image each",
    "same-image": "one image, again and again",
}


def serving_true_shapes() -> str:
    """Return the load on an engine of a released model's shapes."""
    rows = [row for row in results("serving") if row["weights"] == "random"]
    cells = [[DATA[row["data"]], str(row["concurrency"]), *_figures(row)] for row in rows]
    first = rows[0]
    note = (
        f"{first['label']}: {first['model']}'s shapes, {first['weights']} weights, "
        f"{first['precision']} with --activations {first['activations']} and --lm-head "
        f"{first['lm_head']}, answers of {_tokens(rows)} tokens, 8 slots, {first['device']}, "
        f"{first['date']}"
    )
    return markdown(["questions", "clients", *FIGURES], cells, note)


def serving_beside() -> str:
    """Return the same load on vila-serve and on llama-server."""
    rows = [row for row in results("serving") if row["weights"] == "trained"]
    ordered = sorted(rows, key=lambda row: (row["concurrency"], row["server"] != "vila-serve"))
    cells = [[row["server"], str(row["concurrency"]), *_figures(row)] for row in ordered]
    ours, theirs = (
        next(row for row in rows if row["server"] == name)
        for name in ("vila-serve", "llama-server")
    )
    note = (
        f"{ours['label']}: SmolLM2-135M-Instruct, prompts of about {ours['prompt_tokens']:.0f} and "
        f"{theirs['prompt_tokens']:.0f} tokens (each has its own template), answers of "
        f"{_tokens(rows)} tokens, 8 slots, {ours['device']}, {ours['date']}; vila-serve with "
        f"--activations {ours['activations']} and an {ours['lm_head']} head, llama-server "
        f"({theirs['program']}) with {theirs['model'].rpartition('.')[2]}"
    )
    return markdown(["server", "clients", *FIGURES], cells, note)


def serving_kinds() -> str:
    """Return the load on vila-serve by kinds of questions, up to 32 clients."""
    rows = results("serving_kinds")
    cells = [
        [row["model"], DATA[row["data"]], str(row["concurrency"]), *_figures(row)] for row in rows
    ]
    first, seconds = rows[0], [row["seconds"] for row in rows]
    note = (
        f"{first['label']}: {first['precision']} with --activations {first['activations']}, "
        f"answers of {_tokens(rows)} tokens, 8 slots, {first['device']} with nothing else at "
        f"work, {first['date']}; one run each, of {min(seconds):.1f} to {max(seconds):.1f} s"
    )
    return markdown(["model", "questions", "clients", *FIGURES], cells, note)


FIGURES = ("tokens/s", "first token p50", "p99", "a token p50", "longest wait for the next")


def _figures(row: dict[str, Any]) -> list[str]:
    first, token, gap = row["first_token_ms"], row["token_ms"], row["between_pieces_ms"]
    values = (first["p50"], first["p99"], token["p50"], gap["max"])
    return [f"{row['output_tokens_per_s']:.1f}", *(_time(value) for value in values)]


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1e3:.1f} s"
    return f"{milliseconds:.{0 if milliseconds >= 9.5 else 1}f} ms"


def _tokens(rows: list[dict[str, Any]]) -> str:
    return " or ".join(str(count) for count in sorted({row["output_tokens"] for row in rows}))
