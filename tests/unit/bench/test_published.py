"""Every cell of the authors' tables is in speed.csv or accuracy.csv, as it is printed there."""

from __future__ import annotations

import pytest

from vila_deploy.bench.published import published_models, published_speed, read_published
from vila_deploy.bench.table_rows import AUTHORS_MODELS, PRECISIONS, plan_row, table_rows
from vila_deploy.checkpoint.presets import PRESETS
from vila_deploy.engine.target import get_target

TARGETS = ("a100", "rtx4090", "orin")
# Tokens/s of A100, RTX 4090 and Orin in fp16, then in int4.
DECODE = {
    "VILA1.5-3b": "104.6 / 137.6 / 25.4 | 182.8 / 215.5 / 42.5",
    "VILA1.5-3b-s2": "104.3 / 137.2 / 24.6 | 180.2 / 219.3 / 40.1",
    "Llama-3-VILA1.5-8B": "74.9 / 57.4 / 10.2 | 168.9 / 150.2 / 28.7",
    "VILA1.5-13b": "50.9 / OOM / 6.1 | 115.9 / 105.7 / 20.6",
    "VILA1.5-40b": "OOM / OOM / not given | 57.0 / OOM / not given",
    "VILA-7b": "81.6 / 58.5 / 11.5 | 155.3 / 168.1 / 35.6",
    "VILA-13b": "48.5 / OOM / 6.1 | 102.1 / 99.0 / 17.5",
    "NVILA-3B": "140.6 / 190.5 / 42.7 | 184.3 / 230.5 / 45.0",
    "NVILA-Lite-3B": "142.3 / 190.0 / 41.3 | 186.0 / 233.9 / 44.9",
    "NVILA-8B": "82.1 / 61.9 / 11.6 | 186.8 / 162.7 / 28.1",
    "NVILA-Lite-8B": "84.0 / 62.0 / 11.6 | 181.8 / 167.5 / 32.8",
    "NVILA-Video-8B": "73.2 / 58.4 / 10.9 | 151.8 / 145.0 / 32.3",
}
FIRST_TOKEN_S = {
    "NVILA-3B": "0.0329 / 0.0269 / 0.1173 | 0.0260 / 0.0188 / 0.1359",
    "NVILA-Lite-3B": "0.0318 / 0.0274 / 0.1195 | 0.0314 / 0.0191 / 0.1241",
    "NVILA-8B": "0.0434 / 0.0573 / 0.4222 | 0.0452 / 0.0356 / 0.2748",
    "NVILA-Lite-8B": "0.0446 / 0.0458 / 0.2507 | 0.0391 / 0.0297 / 0.2097",
    "NVILA-Video-8B": "0.7190 / 0.8840 / 5.8236 | 0.6692 / 0.6815 / 5.8425",
}
BENCHMARKS = (
    "VQAv2", "GQA", "VizWiz", "SQA-I", "VQA-T", "POPE", "MME", "MMB", "MMB-CN", "SEED", "SEED-I",
    "MMMU val", "MMMU test", "LLaVA-Bench", "MM-Vet", "average",
)  # fmt: skip
# Scores in fp16, then in int4.
ACCURACY = {
    "VILA1.5-3b": (
        "80.4 61.5 53.5 69.0 60.4 85.9 1442.44 63.4 52.7 60.9 67.9 33.3 30.8 75.9 35.4 60.2",
        "80.0 61.1 53.8 67.8 60.4 85.9 1437.34 63.3 51.4 59.8 66.6 32.7 31.1 75.0 37.3 59.9",
    ),
    "VILA1.5-3b-s2": (
        "79.8 61.4 61.3 69.6 63.4 85.3 1431.65 62.8 52.2 60.0 66.4 32.8 31.3 76.7 38.6 60.9",
        "79.4 61.3 62.3 69.2 63.0 85.8 1417.06 61.6 51.5 59.1 65.7 33.4 30.4 77.1 36.7 60.5",
    ),
    "Llama-3-VILA1.5-8B": (
        "80.9 61.9 58.7 79.9 66.3 84.4 1577.01 72.3 66.2 64.2 71.4 36.9 36.0 80.0 38.3 65.1",
        "80.3 61.7 59.3 79.0 65.4 82.9 1593.65 71.0 64.9 64.0 71.1 36.0 36.1 79.0 37.2 64.5",
    ),
    "VILA1.5-13b": (
        "82.8 64.3 62.6 80.1 65.0 86.3 1569.55 74.9 66.3 65.1 72.6 37.9 33.6 80.8 44.3 66.3",
        "82.7 64.5 63.3 79.7 64.7 86.7 1531.35 74.7 66.7 65.1 72.6 37.8 34.0 81.9 46.4 66.5",
    ),
    "VILA1.5-40b": (
        "84.3 64.6 62.2 87.2 73.6 87.3 1726.82 82.4 80.2 69.1 75.8 51.9 46.9 81.3 53.0 72.4",
        "84.1 64.4 61.3 86.7 73.2 88.2 1714.79 83.2 79.6 68.9 75.6 49.3 46.2 83.0 51.4 72.1",
    ),
}


def cells(line: str, model: str) -> dict[tuple[str, str, str], str]:
    parts = [part.strip().split(" / ") for part in line.split("|")]
    return {
        (model, precision, target): value.replace("OOM", "out of memory")
        for precision, values in zip(PRECISIONS, parts, strict=True)
        for target, value in zip(TARGETS, values, strict=True)
    }


def test_decode_speed() -> None:
    assert list(DECODE) == published_models()
    expected = {key: v for model, line in DECODE.items() for key, v in cells(line, model).items()}
    rows = read_published("speed")
    assert len(rows) == len(expected)
    assert {key: published_speed(*key) for key in expected} == expected
    assert published_speed("VILA1.5-3b", "int4", "h100") is None


def test_time_to_first_token() -> None:
    expected = {
        key: v for model, line in FIRST_TOKEN_S.items() for key, v in cells(line, model).items()
    }
    given = {
        (row["model"], row["precision"], row["target"]): row["ttft_s"]
        for row in read_published("speed")
        if row["ttft_s"]
    }
    assert given == expected


def test_accuracy() -> None:
    expected = {
        (model, precision, name): score
        for model, lines in ACCURACY.items()
        for precision, line in zip(PRECISIONS, lines, strict=True)
        for name, score in zip(BENCHMARKS, line.split(), strict=True)
    }
    rows = read_published("accuracy")
    assert len(rows) == len(expected) == 160
    given = {(row["model"], row["precision"], row["benchmark"]): row["score"] for row in rows}
    assert given == expected


def test_every_row_names_its_source() -> None:
    for name in ("speed", "accuracy"):
        assert all("VILA" in row["source"] for row in read_published(name))


@pytest.mark.parametrize("name", TARGETS)
def test_where_the_authors_ran_out_of_memory_our_plan_does_too(name: str) -> None:
    target = get_target(name)
    rows = [row for row in table_rows(True, (), target) if row.model in PRESETS]
    out = [
        row for row in rows
        if published_speed(row.model, row.precision, name) == "out of memory"
    ]  # fmt: skip
    for row in out:
        plan = plan_row(row, target)
        assert not plan.fits, row.title
        assert plan.advice
    assert len(out) == {"a100": 1, "rtx4090": 4, "orin": 0}[name]


def test_the_authors_table_has_ten_rows() -> None:
    rows = table_rows(False, (), get_target("cpu"))
    assert [row.model for row in rows[::2]] == list(AUTHORS_MODELS)
    assert len(rows) == 10
    every = {row.model for row in table_rows(True, (), get_target("cpu"))}
    assert every == {*PRESETS, *published_models()}
