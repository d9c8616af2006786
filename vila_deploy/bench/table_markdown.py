"""The filled table as Markdown, in the authors' shape, with the notes that its figures need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vila_deploy.bench.host_load import NOISY_CORES
from vila_deploy.bench.measure_row import TINYCHAT_CONTEXT
from vila_deploy.bench.predict import predicted
from vila_deploy.bench.published import OUT_OF_MEMORY, published_speed
from vila_deploy.bench.roofline import DEVICES, roofline
from vila_deploy.builder.plan import plan_build
from vila_deploy.builder.resolve import BuildOptions, resolve_random_build
from vila_deploy.checkpoint.presets import PRESETS

Row = dict[str, Any]
Cells = Sequence[str]
DASH = "–"
TTFT_PARTS = ("preprocess", "vision", "prefill")


def render_table(rows: Sequence[Row]) -> str:
    """Return decode speed, time to first token, contexts if measured, reasons and conditions."""
    parts = [
        "## Decode tokens/s, batch 1",
        decode_table(rows),
        DECODE_NOTE,
        "## Time to first token: a question about one image",
        first_token_table(rows),
    ]
    if any(row.get("contexts") for row in rows):
        parts += ["## Decode tokens/s by cached tokens", _context_table(rows)]
    parts += [notes(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def notes(rows: Sequence[Row]) -> str:
    """Return why rows have no measured figure, and under which conditions the others have one."""
    return "\n\n".join(part for part in (_reasons(rows), _conditions(rows)) if part)


NOISY_NOTE = "**Noisy host**: on a quiet computer these rows would have other figures."
OTHERS_AT_WORK = f"other processes took more than {NOISY_CORES:.0%} of a core"
DECODE_NOTE = (
    "*here*: median (least–most) of the repetitions. *share*: of what this computer's memory "
    "bandwidth allows, behind the image. Other devices: *published by the authors / predicted / "
    "roofline*. Predicted, not measured: what backend native should reach there with 4 tokens "
    "cached, by a model of its kernels (vila_deploy/bench/predict.py) that is meant to be right "
    "within 15%. The roofline is the published bandwidth over the bytes of a step without cached "
    "tokens (int4: 4 bits, float16 scale and 4-bit zero point for each 128; head in float16), a "
    "limit. OOM: out of memory."
)


def decode_table(rows: Sequence[Row]) -> str:
    """Return the decode speed of all rows beside published figures and rooflines."""
    titles = ["model", "precision", "here, 4 tokens cached (TinyChat's)", "here, behind an image"]
    titles += ["share", *DEVICES.values()]
    body = [
        [
            row["model"],
            row["precision"],
            speed_cell(row, "tinychat"),
            speed_cell(row, "image"),
            _share(row),
            *(device_cell(row["model"], row["precision"], device) for device in DEVICES),
        ]
        for row in rows
    ]
    return markdown(titles, body)


def speed_cell(row: Row, kind: str) -> str:
    """Return the tokens/s of a row, with what kind of figure it is unless it was measured."""
    label = row["label"]
    if label == "oom":
        return f"OOM: {row['needed_bytes'] / 1e9:.1f} of {row['limit_bytes'] / 1e9:.1f} GB"
    if label not in ("measured", "predicted"):
        return label
    return _speed(row["decode"][kind], row)


def _speed(decode: Row, row: Row) -> str:
    speed = decode["tokens_per_s"]
    if row["label"] == "predicted":
        return f"predicted {'at most ' if row['upper_bound'] else ''}{_number(speed)}"
    spread = f"{_number(decode['min_tokens_per_s'])}–{_number(decode['max_tokens_per_s'])}"
    return f"**{_number(speed)}** ({spread})"


def _number(speed: float) -> str:
    return f"{speed:.2f}" if speed < 10 else f"{speed:.1f}"


def _share(row: Row) -> str:
    share = row.get("roofline_fraction")
    if row["label"] == "predicted" and row["share"]:
        return f"assumed {row['share']:.0%}"
    return DASH if share is None else f"{share:.0%}"


def device_cell(model: str, precision: str, device: str) -> str:
    """Return `published / predicted / roofline` of a released model on another device."""
    published = published_speed(model, precision, device)
    published = {OUT_OF_MEMORY: "OOM", None: DASH}.get(published, published)
    if model not in PRESETS:
        return f"{published} / {DASH} / {DASH}"
    expected = predicted_cell(model, precision, device)
    return f"{published} / {expected} / {roofline(model, precision, device):.0f}"


def predicted_cell(model: str, precision: str, device: str) -> str:
    """Return the tokens/s that backend native should reach there; OOM where it does not fit."""
    request = BuildOptions(device, backend="native")
    if not plan_build(resolve_random_build(model, precision, request)).fits:
        return "OOM"
    return f"{predicted(model, precision, device, TINYCHAT_CONTEXT):.0f}"


def first_token_table(rows: Sequence[Row]) -> str:
    """Return time to first token, load and memory of the measured rows."""
    titles = ["model", "precision", *(f"{part} s" for part in TTFT_PARTS), "first token s"]
    titles += ["prefill tokens/s", "load s", "resident after load GB", "at the end GB"]
    measured = [row for row in rows if row["label"] == "measured"]
    energy = any(row["energy_joules"] is not None for row in measured)
    body = []
    for row in measured:
        seconds = [row["ttft_ms"][part] / 1e3 for part in (*TTFT_PARTS, "total")]
        memory = [row["resident_after_load_bytes"], row["resident_at_end_bytes"]]
        body.append(
            [
                row["model"],
                row["precision"],
                *(f"{value:.2f}" for value in seconds),
                f"{row['prefill_tokens_per_s']:.1f}",
                f"{row['load_s']:.1f}",
                *(DASH if size is None else f"{size / 1e9:.2f}" for size in memory),
                *([_joules(row)] if energy else []),
            ]
        )
    if not body:
        return "No row was measured."
    return markdown([*titles, *(["energy of the measurement J"] if energy else [])], body)


def _joules(row: Row) -> str:
    return DASH if row["energy_joules"] is None else f"{row['energy_joules']:.0f}"


def _context_table(rows: Sequence[Row]) -> str:
    contexts = sorted({point["context"] for row in rows for point in row.get("contexts", ())})
    body = []
    for row in rows:
        points = {point["context"]: point for point in row.get("contexts", ())}
        if points:
            cells = [_speed(points[c], row) if c in points else DASH for c in contexts]
            body.append([row["model"], row["precision"], *cells])
    return markdown(["model", "precision", *map(str, contexts)], body)


def _reasons(rows: Sequence[Row]) -> str:
    lines = [
        f"- {row['model']} {row['precision']}: {_word(row['label'])}: {row['reason']}"
        for row in rows
        if row.get("reason")
    ]
    short = [
        f"- {row['model']} {row['precision']}: {row['decode']['image']['tokens']} tokens a "
        "repetition, since a step is slow"
        for row in rows
        if row["label"] == "measured" and row["decode"]["image"]["tokens"] < row["asked_tokens"]
    ]
    return "\n".join([*lines, *short])


def _word(label: str) -> str:
    return {"oom": "out of memory"}.get(label, label)


def _conditions(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["label"] == "measured"]
    lines = []
    for row in measured:
        state = row["state"]
        facts = [
            f"{row['device']}, {state['cores']} cores",
            f"backend {row['backend']}, {row['weights']} weights",
            ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
            f"commit {row['commit']}",
        ]
        lines.append("Measured on " + "; ".join(facts) + ".")
    bandwidths = [row["read_bandwidth_bytes_per_s"] / 1e9 for row in measured
                  if row["read_bandwidth_bytes_per_s"]]  # fmt: skip
    if bandwidths:
        kind = measured[0]["bandwidth_label"]
        least, most = min(bandwidths), max(bandwidths)
        lines.append(f"Memory bandwidth, {kind}: {least:.1f} to {most:.1f} GB/s.")
    stolen = [row["stolen_cores"] for row in measured if row.get("stolen_cores") is not None]
    if any(cores >= 0.005 for cores in stolen):
        lines.append(f"Stolen by other guests of the host: up to {max(stolen):.2f} of a core.")
    return "\n".join([*dict.fromkeys(lines), *_noise(measured)])


def _noise(measured: Iterable[Row]) -> list[str]:
    # Rows of version 0.1.0 and before have no reasons beside their mark.
    noisy = [
        f"- {row['model']} {row['precision']}: {'; '.join(row.get('noise') or [OTHERS_AT_WORK])}"
        for row in measured
        if row.get("noisy")
    ]
    return ["", NOISY_NOTE, "", *noisy] if noisy else []


def markdown(titles: Cells, rows: Iterable[Cells]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
