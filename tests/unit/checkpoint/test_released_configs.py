"""Every released configuration: its description, and what both --plan commands say of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import assert_one_line, invoke, succeed
from tests.support.released_configs import NVILA, RELEASED, write_configs
from vila_deploy.checkpoint.config import load_config
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", RELEASED)
def test_it_is_described_as_the_originals_compute_it(name: str, tmp_path: Path) -> None:
    row = RELEASED[name]
    root, expected = write_configs(tmp_path / "c", row), row.expected
    config = load_config(root)
    model = ModelInfo.from_config(config, load_tokenizer(root / "llm"))
    assert (model.prompt, config.generation) == (expected.template, expected.generation)
    assert config.token_order == ("row" if expected.generation == "nvila" else "column")
    assert config.max_tokens_per_image == expected.tokens_per_image
    assert (config.tiling.mode, config.video.num_frames) == (expected.tiling, expected.frames)
    assert config.tokens_per_video == expected.tokens_per_video
    assert config.model_max_length == expected.longest
    assert config.llm.rope_factor == expected.rope_factor
    assert config.llm.num_layers * config.llm.hidden_size == (
        row.llm["num_hidden_layers"] * row.llm["hidden_size"]
    )
    assert config.llm.tie_word_embeddings == row.llm.get("tie_word_embeddings", False)
    assert set(expected.stops) <= set(config.llm.eos_token_ids)


@pytest.mark.parametrize("name", RELEASED)
def test_both_plans_take_it(name: str, tmp_path: Path) -> None:
    row = RELEASED[name]
    root, expected = write_configs(tmp_path / "c", row), row.expected
    built = json.loads(succeed("vila-build-engine", root, "--target", "h200", "--plan", "--json"))
    assert built["video"]["frames"] == expected.frames
    assert built["video"]["tokens"] == expected.tokens_per_video
    head = {item["name"]: item["parameters"] for item in built["components"]}
    assert head["llm embeddings"] == row.llm["vocab_size"] * row.llm["hidden_size"]
    assert {fit["target"] for fit in built["targets"]} >= {"orin", "rtx4090", "cpu"}
    if expected.precision == "int4":
        assert_one_line(invoke("vila-quantize", root, "--plan"))
        return
    plan = json.loads(succeed("vila-quantize", root, "--plan", "--json", "--text-only"))
    assert plan["video"]["tokens"] == expected.tokens_per_video
    assert plan["output_bytes"] > 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "VILA-HD-8B-PS3-1.5K-SigLIP": (
        {"ps3": True, "model_type": "llava_topdown_llama", "look_close_mode": "after_prompt"},
        "PS3 towers (VILA-HD) are not supported",
    ),
    "VILA-HD by its class": (
        {"model_type": "llava_topdown_llama"}, "PS3 towers (VILA-HD) are not supported",
    ),
    "NVILA-8B-HD-Video": (
        {"autogaze_model": "nvidia/AutoGaze"}, "AutoGaze (NVILA-8B-HD-Video) is not supported",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["vila-quantize", "vila-build-engine"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_not_computed_are_refused_by_name(
    name: str, command: str, tmp_path: Path
) -> None:
    changes, message = REFUSED[name]
    row = RELEASED["NVILA-8B"]
    root = write_configs(tmp_path / "c", replace(row, root={**NVILA, **row.root, **changes}))
    flags = ["--plan", *(["--target", "h200"] if command == "vila-build-engine" else [])]
    assert message in assert_one_line(invoke(command, root, *flags))
