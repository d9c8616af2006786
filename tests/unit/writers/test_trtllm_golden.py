"""Names, dtypes, shapes and configs against NVIDIA Model Optimizer's export of the same models.

tests/support/modelopt_trtllm.py made golden/trtllm_*.json and says how.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.paths import GOLDEN
from tests.support.trtllm_cases import config_of
from vila_deploy.checkpoint.trtllm_sharding import (
    Parallel,
    checkpoint_config,
    layer_quantization,
    rank_tensors,
)

# Only producer's content may differ; TensorRT-LLM itself adds qwen_type where Model Optimizer's
# exporter leaves it out.
OURS_ONLY: dict[str, set[str]] = {"llama": set(), "qwen2": {"qwen_type"}, "smollm2": set()}


def cases() -> list[tuple[str, str]]:
    found = []
    for file in sorted(GOLDEN.glob("trtllm_*.json")):
        found += [(file.stem.removeprefix("trtllm_"), p) for p in json.loads(file.read_text())]
    return found


def golden(model: str, precision: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"trtllm_{model}.json").read_text())[precision]


def test_there_are_cases():
    assert {"llama", "qwen2"} <= {model for model, _ in cases()}
    assert {"fp16", "int4_awq"} == {precision for _, precision in cases()}


@pytest.mark.parametrize(("model", "precision"), cases())
def test_tensors_are_model_optimizers(model, precision):
    group_size = 64 if precision == "int4_awq" else None
    tensors = rank_tensors(config_of(model, group_size), group_size, Parallel(), 0)
    ours = {name: [dtype, list(shape)] for name, shape, (dtype,) in tensors}
    assert ours == golden(model, precision)["ranks"]["rank0.safetensors"]


@pytest.mark.parametrize(("model", "precision"), cases())
def test_configs_are_model_optimizers(model, precision):
    group_size = 64 if precision == "int4_awq" else None
    configs = golden(model, precision)["configs"]
    config = config_of(model, group_size)
    ours = checkpoint_config(config, group_size, Parallel())
    theirs = configs["config.json"]
    assert ours.keys() - theirs.keys() == OURS_ONLY[model]
    assert not theirs.keys() - ours.keys()
    different = {key for key in theirs if ours[key] != theirs[key]}
    assert different == {"producer"}
    assert configs.get("quant_cfg.json") == layer_quantization(group_size)
