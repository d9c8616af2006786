"""NVIDIA Model Optimizer's own exports, made here: read, compared with the model, written again.

Needs nvidia-modelopt with the transformers that it supports (see modelopt_trtllm.py), hence an
environment of its own: PYTHONPATH=. python -m pytest tests/interop/test_modelopt_trtllm.py
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")

from tests.support.modelopt_trtllm import export, summary, tiny
from tests.support.paths import GOLDEN
from tests.support.trtllm_cases import config_of
from vila_deploy.checkpoint.trtllm_reader import TrtllmCheckpoint
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.trtllm import LINEARS, QKV
from vila_deploy.writers.trtllm import write_trtllm


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("precision", ["fp16", "int4_awq"])
def test_exports_are_read_and_written_alike(tmp_path, family, precision):
    model = tiny(family.capitalize())
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "theirs", precision == "int4_awq")
    golden = json.loads((GOLDEN / f"trtllm_{family}.json").read_text())[precision]
    found = summary(tmp_path / "theirs")
    for one in (golden, found):
        one["configs"]["config.json"].pop("producer")
    assert found == golden

    config = config_of(family, 64 if precision == "int4_awq" else None)
    back = TrtllmCheckpoint(tmp_path / "theirs", config)
    for index in range(config.num_layers):
        for name in (*QKV, *LINEARS):
            full = f"model.layers.{index}.{name}"
            weight, linear = original[f"{full}.weight"], back.linear(full)
            if isinstance(linear, QuantizedLinear):
                error = (linear.dequantize() - weight.float()).norm() / weight.float().norm()
                assert 0.02 < error < 0.15, (full, float(error))
            else:
                assert torch.equal(linear, weight)
            if f"{full}.bias" in original:
                assert torch.equal(back.tensor(f"{full}.bias"), original[f"{full}.bias"])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(back.tensor(name), original[name])

    (tmp_path / "ours").mkdir()
    write_trtllm(config, back, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / f / "rank0.safetensors") for f in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        # Scales are float32 there; what was read holds them as the engine will, in float16.
        expected = tensor.half().float() if name.endswith("weights_scaling_factor") else tensor
        assert torch.equal(ours[name], expected), name
