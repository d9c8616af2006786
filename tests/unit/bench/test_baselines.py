"""How rows of other programs are compared and shown."""

from __future__ import annotations

import pytest

from vila_deploy.bench.baselines import compare, render_baselines

ABOUT = {"model": "VILA1.5-3b", "precision": "int4", "label": "measured", "noisy": False}


def ours(number: int, **figures: float) -> dict[str, object]:
    return {**ABOUT, "what": "vila-deploy", "round": number, **figures}


def theirs(number: int, **figures: float) -> dict[str, object]:
    return {**ABOUT, "what": "llama.cpp", "round": number, **figures}


def test_a_round_has_the_better_setting_of_the_other_program() -> None:
    rows = [
        ours(1, decode_0_ms=10.0), theirs(1, decode_0_ms=15.0),
        ours(1, decode_0_ms=12.0), theirs(1, decode_0_ms=13.2),
        ours(2, decode_0_ms=10.0), theirs(2, decode_0_ms=30.0),
    ]  # fmt: skip
    found = compare(rows, "decode_0_ms")
    assert found is not None
    assert found.ratios == pytest.approx((13.2 / 11.0, 3.0))
    assert (found.ours, found.theirs) == pytest.approx((10.5, 21.6))


def test_a_round_without_the_other_program_is_left_out() -> None:
    rows = [ours(1, decode_0_ms=10.0), ours(2, decode_0_ms=10.0), theirs(2, decode_0_ms=11.0)]
    found = compare(rows, "decode_0_ms")
    assert found is not None
    assert found.ratios == pytest.approx((1.1,))
    assert compare(rows, "prefill_256_s") is None


def test_markdown_has_comparison_products_and_reasons() -> None:
    product = {"what": "OpenVINO, int8", "label": "measured", "noisy": True, "model": "VILA1.5-3b"}
    text = render_baselines(
        [
            ours(1, decode_0_ms=10.0),
            theirs(1, decode_0_ms=15.0),
            {**product, "products_1_ms": 50.0, "products_256_ms": 3000.0},
            {**ABOUT, "what": "llama.cpp", "precision": "fp16", "label": "skipped", "reason": "no"},
            {"what": "OpenVINO, bf16", "label": "skipped", "reason": "no network"},
        ]
    )
    assert "| decode at context 0 | 10 ms | 15 ms | 1.50 |" in text
    assert "| 960 | – | – | – |" in text
    assert "| OpenVINO, int8 | 50 ms | 3e+03 ms |" in text
    assert "- llama.cpp, VILA1.5-3b fp16: skipped: no\n" in text
    assert "- OpenVINO, bf16: skipped: no network\n" in text
    assert "Noisy host" in text
    assert render_baselines([]) == ""
