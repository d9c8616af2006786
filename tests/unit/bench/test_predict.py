"""The model of a decoding step against figures that were worked out by hand before it was code."""

from __future__ import annotations

import pytest

from vila_deploy.bench import predict
from vila_deploy.bench.predict import GPUS, predicted, step_model
from vila_deploy.bench.roofline import DEVICES, roofline
from vila_deploy.checkpoint.presets import preset
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.tile_config import GemvTile

MODELS = {
    "3B": "VILA1.5-3b", "8B": "Llama-3-VILA1.5-8B", "13B": "VILA1.5-13b", "40B": "VILA1.5-40b",
}  # fmt: skip
# Tokens/s on an H200 behind 544 tokens, a float16 head, and microseconds of a layer's parts with
# pdl-merged-attention: the review of the kernels as they were at commit 500db21.
REVIEW = {
    "separate": (940, 580, 375, 166),
    "merged-attention": (990, 600, 387, 168),
    "pdl": (1140, 650, 414, 176),
    "pdl-merged-attention": (1190, 670, 422, 178),
}
PARTS = ("qkv", "o", "gate_up", "down", "attention")
REVIEW_PARTS = {
    "3B": (5.3, 2.9, 6.1, 5.2, 5.4),
    "8B": (4.9, 3.7, 16.7, 9.4, 3.8),
    "13B": (11.7, 5.7, 19.9, 12.9, 6.9),
    "40B": (10.1, 10.5, 39.6, 25.8, 3.8),
}


@pytest.fixture
def _tiles_of_the_review(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and loops get better; what was worked out holds for those of then."""

    def gemv_tile(capability: ComputeCapability, out_features: int, blocks: int) -> GemvTile:
        wide = out_features >= 2 * 32 * 132
        return GemvTile(32, 4, 4) if wide else GemvTile(16, 8, 4)

    def splits(capability: ComputeCapability, kv_heads: int, max_seq_len: int) -> int:
        return {20: 4, 8: 16, 40: 2}[kv_heads]

    monkeypatch.setattr(predict.tile_config, "gemv_tile", gemv_tile)
    monkeypatch.setattr(predict.tile_config, "gate_up_tile", lambda *_: GemvTile(32, 4, 4))
    monkeypatch.setattr(predict.tile_config, "attention_splits", splits)
    monkeypatch.setattr(
        predict.tile_config, "shared_bytes", lambda t: {16: 75, 32: 50}[t.rows] << 10
    )
    instructions = {(4, 16): 3.47, (4, 32): 2.34, (16, 32): 1.45}
    monkeypatch.setattr(predict, "INSTRUCTIONS", instructions)
    monkeypatch.setattr(predict, "issued_rounds", lambda tile, blocks: 1.0)
    code = predict.AttentionCode(warps=4, ahead=637, loop=630, behind=600, split=0)
    monkeypatch.setattr(predict, "ATTENTION", code)


def test_eight_sequences_share_what_the_products_cost() -> None:
    for model in MODELS.values():
        step = step_model(preset(model, "int4").llm, "h200")
        alone, together = (step.layer_seconds(544, sequences) for sequences in (1, 8))
        assert {name for name in PARTS if together[name] != alone[name]} == {"attention"}
        assert alone["attention"] < together["attention"] < 8 * alone["attention"]
        assert 4 < 8 * step.seconds(544) / step.seconds(544, 8) < 8


@pytest.mark.usefixtures("_tiles_of_the_review")
@pytest.mark.parametrize("mode", REVIEW)
def test_whole_steps_are_those_of_the_review(mode: str) -> None:
    for model, expected in zip(MODELS.values(), REVIEW[mode], strict=True):
        found = 1 / step_model(preset(model, "int4").llm, "h200", mode).seconds(544)
        assert found == pytest.approx(expected, rel=0.03), model


@pytest.mark.usefixtures("_tiles_of_the_review")
@pytest.mark.parametrize("model", REVIEW_PARTS)
def test_parts_of_a_layer_are_those_of_the_review(model: str) -> None:
    step = step_model(preset(MODELS[model], "int4").llm, "h200", "pdl-merged-attention")
    found = step.layer_seconds(544)
    for part, expected in zip(PARTS, REVIEW_PARTS[model], strict=True):
        assert found[part] * 1e6 == pytest.approx(expected, rel=0.06), part


def test_no_prediction_is_above_the_roofline() -> None:
    assert GPUS.keys() == DEVICES.keys()
    for target in GPUS:
        for model in MODELS.values():
            for precision in ("int4", "fp16"):
                limit = roofline(model, precision, target, 4)
                assert 0.2 * limit < predicted(model, precision, target, 4) < limit


def test_what_reads_less_is_faster() -> None:
    llm = preset("Llama-3-VILA1.5-8B", "int4").llm
    for target in GPUS:
        plain = step_model(llm, target).seconds(544)
        assert step_model(llm, target, lm_head="int8").seconds(544) < plain
        assert step_model(llm, target).seconds(4000) > plain
        assert step_model(llm, target, "merged-attention").seconds(544) < plain
