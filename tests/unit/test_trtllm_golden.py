"""Names, dtypes, shapes and configs against NVIDIA Model Optimizer's export of the same models.

tests/interop/modelopt_trtllm.py made golden/trtllm_*.json and says how.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trtllm import llm_config

from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.trtllm_layout import (
    Parallel,
    checkpoint_config,
    layer_quantization,
    rank_tensors,
)

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {torch.float16: "F16", torch.float32: "F32", torch.int8: "I8"}
# Only producer's content may differ; TensorRT-LLM itself adds qwen_type where Model Optimizer's
# exporter leaves it out.
OURS_ONLY: dict[str, set[str]] = {"llama": set(), "qwen2": {"qwen_type"}, "smollm2": set()}


def config_of(model: str, group_size: int | None) -> LlmConfig:
    if model == "smollm2":
        config = replace(
            llm_config(group_size=None),
            hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
            intermediate_size=1536, vocab_size=49152, rope_theta=1e5, max_position_embeddings=8192,
            rms_norm_eps=9.999999747378752e-06, tie_word_embeddings=True,
        )  # fmt: skip
    else:
        family = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model]
        config = llm_config(family, group_size=None)
    if group_size is None:
        return config
    quantization = QuantizationConfig("awq", 4, group_size, False, "gemm")
    return replace(config, quantization=quantization)


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
    ours = {name: [NAMES[dtype], list(shape)] for name, (dtype, shape) in tensors.items()}
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
