"""Linear scaling of positions, as in the LongVILA with a million tokens, against the original's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.original_checkpoint import session_of, write_checkpoint
from tests.support.paths import GOLDEN
from tests.support.vision_cases import assert_sample
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.model.llm import rotary
from vila_deploy.onnx_export.rotary import rotary_tables

CASES = json.loads((GOLDEN / "rope_scaling.json").read_text("utf-8"))["cases"]
IDS = [(7 * i * i + 3 * i + 5) % 64 for i in range(200)]


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_original(name: str, tmp_path: Path) -> None:
    expected, qwen2 = CASES[name], name.startswith("qwen2")
    scaling = {"rope_scaling": expected["rope_scaling"]}
    session = session_of(write_checkpoint(tmp_path / "c", qwen2=qwen2, llm=scaling))
    logits = session.llm(torch.from_numpy(session.embed_tokens(IDS))).numpy()
    # Logits differ by up to 5 from those without scaling.
    assert_sample(logits, expected["logits"], 2e-5)


@pytest.mark.parametrize(
    "llm",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
    ],
    ids=str,
)
def test_engines_tables_hold_the_same_angles(llm: dict[str, object], tmp_path: Path) -> None:
    """What every backend of ours reads, in each of transformers' spellings."""
    config = open_checkpoint(write_checkpoint(tmp_path / "c", qwen2=True, llm=llm)).config.llm
    scaled = "linear" in str(llm)
    assert config.rope_factor == (4.0 if scaled else 1.0)
    half = config.head_dim // 2
    angles = np.arange(64)[:, None] / config.rope_factor
    angles = angles * config.rope_theta ** -(np.arange(half) / half)
    expected = rotary(config, torch.arange(64))
    for table, function, whole in zip(
        rotary_tables(config, 64), (np.cos, np.sin), expected, strict=True
    ):
        np.testing.assert_allclose(table, function(angles), rtol=0, atol=1e-5)
        np.testing.assert_allclose(whole[0, :, :half], table, rtol=0, atol=1e-6)
