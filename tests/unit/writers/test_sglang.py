"""SGLang's one folder: what its classes' load_weights looks for, and there and back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2Config, SiglipVisionConfig, SiglipVisionModel

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.convert import convert

LITE: dict[str, Any] = {
    "qwen2": True, "kv_heads": 2, "projector": "mlp_downsample_3x3_fix", "quantized": True,
    "added_tokens": ("<image>",), "root_config": {"image_aspect_ratio": "dynamic"},
    "vision_hidden": 1152, "vision_layers": 2, "vision_heads": 16,
}  # fmt: skip
S2: dict[str, Any] = {
    "qwen2": True, "kv_heads": 2, "quantized": True, "scales": 3,
    "vision_hidden": 1152, "vision_layers": 2, "vision_heads": 16, "image": 448,
    "root_config": {
        "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "448,896,1344",
        "s2_max_split_size": 448, "s2_resize_output_to_scale_idx": -1,
    },
}  # fmt: skip
CASES = {
    "NVILALiteForConditionalGeneration": {**LITE, "tied": True},
    "NVILAForConditionalGeneration": S2,
}  # fmt: skip


def parameters_of_their_class(config: dict[str, Any], channels: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the class has parameters for, by torch and transformers.

    SGLang joins q, k, v and gate, up when it loads; here they are apart, as files have them.
    """
    text, group = Qwen2Config(**config["text_config"]), config["quantization_config"]["group_size"]
    hidden, inner, head = text.hidden_size, text.intermediate_size, text.hidden_size // 4
    keys = text.num_key_value_heads * head
    found: dict[str, tuple[int, ...]] = {}
    for index in range(text.num_hidden_layers):
        layer = f"llm.model.layers.{index}"
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden), ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            found[f"{layer}.{name}.qweight"] = (columns, rows // 8)
            found[f"{layer}.{name}.qzeros"] = (columns // group, rows // 8)
            found[f"{layer}.{name}.scales"] = (columns // group, rows)
            if name[-6] in "qkv":
                found[f"{layer}.{name}.bias"] = (rows,)
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    found["llm.model.norm.weight"] = (hidden,)
    found["llm.model.embed_tokens.weight"] = (text.vocab_size, hidden)
    if not text.tie_word_embeddings:
        found["llm.lm_head.weight"] = (text.vocab_size, hidden)
    with torch.device("meta"):
        tower = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"])).state_dict()
    for name, tensor in tower.items():
        # Newer versions of transformers leave the inner module's name out.
        own = name if name.startswith("vision_model.") else f"vision_model.{name}"
        found[f"vision_tower.{own}"] = tuple(tensor.shape)
    lite = not config["architectures"][0].startswith("NVILAForC")
    wide, middle = (9 * channels, 3 * channels) if lite else (4 * channels, hidden)
    shapes: dict[str, tuple[int, ...]] = {"1": (wide,), "2": (middle, wide), "4": (hidden, hidden)}
    if lite:
        shapes |= {"4": (middle,), "5": (hidden, middle), "7": (hidden, hidden)}
    for index, shape in shapes.items():
        found[f"mm_projector.layers.{index}.weight"] = shape
        found[f"mm_projector.layers.{index}.bias"] = shape[:1]
    return found


def weights(root: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in root.rglob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same(one: Checkpoint, two: Checkpoint) -> None:
    for index in range(one.config.llm.num_layers):
        for name in one.config.llm.linears:
            left, right = (c.llm.linear(f"model.layers.{index}.{name}") for c in (one, two))
            assert isinstance(left, QuantizedLinear)
            assert isinstance(right, QuantizedLinear)
            for field in ("q", "scale", "zero"):
                assert torch.equal(getattr(left, field), getattr(right, field)), name
            if left.bias is not None:
                assert right.bias is not None
                assert torch.equal(left.bias, right.bias)
    for part in ("vision", "projector"):
        mine, other = getattr(one, part), getattr(two, part)
        assert other.names()
        assert all(torch.equal(mine.tensor(n), other.tensor(n)) for n in other.names())
    assert torch.equal(one.llm.tensor("lm_head.weight"), two.llm.tensor("lm_head.weight"))
    for field in ("vision", "projector", "image", "tiling", "token_order", "model_max_length"):
        assert getattr(one.config, field) == getattr(two.config, field), field
    assert one.config.llm.quantization == two.config.llm.quantization


@pytest.mark.parametrize("architecture", CASES)
def test_there_and_back(architecture: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", **CASES[architecture])
    convert(root, tmp_path / "one", ["sglang"])
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["quantization_config"]["quant_method"] == "awq"
    channels = config["mm_hidden_size"]
    expected = parameters_of_their_class(config, channels)
    found = {name: tuple(t.shape) for name, t in weights(tmp_path / "one").items()}
    assert found == expected
    original, one = open_checkpoint(root), open_checkpoint(tmp_path / "one")
    assert_same(original, one)
    convert(tmp_path / "one", tmp_path / "back", ["awq"])
    assert_same(original, open_checkpoint(tmp_path / "back"))
    tokenizer = Tokenizer.from_file(str(root / "llm" / "tokenizer.json"))
    size, known = tokenizer.get_vocab_size(), tokenizer.token_to_id("<image>")
    assert config["image_token_id"] == (size if known is None else known)
    assert config["video_token_id"] == size + (known is None)


def test_symmetric_is_remembered(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", **LITE)
    file = root / "llm" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["zero_point"] = False
    file.write_text(json.dumps(config))
    convert(root, tmp_path / "one", ["sglang"])
    said = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert said["zero_point"] is True
    quantization = open_checkpoint(tmp_path / "one").config.llm.quantization
    assert quantization is not None
    assert not quantization.zero_point


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qwen2": False}, "have Qwen2 only, found a llama LLM"),
        ({"projector": "mlp2x_gelu"}, "only, found projector mlp2x_gelu"),
        ({"projector": "mlp_downsample", "root_config": {}}, "found single tiles of 1152 channels"),
        ({"root_config": {"mm_projector_token_order": "column"}}, "row by row only"),
        (
            {
                "root_config": {
                    **LITE["root_config"],
                    "video_encoder": {"_target_": "x.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]},
                }
            },
            "frames as images only, found TSPVideoEncoder",
        ),
    ],
)
def test_refuses_what_no_class_computes(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    root = make_checkpoint(tmp_path / "q", **{**LITE, **changes})
    with pytest.raises(VilaDeployError, match=message) as caught:
        convert(root, tmp_path / "out", ["sglang"])
    assert re.search(r"docs/formats\.md", str(caught.value))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_reading_refuses_a_class_that_is_not_known(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "q", **LITE), tmp_path / "one", ["sglang"])
    file = tmp_path / "one" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["JetVLMForConditionalGeneration"]}))
    with pytest.raises(VilaDeployError, match="unknown class 'JetVLMForConditionalGeneration'"):
        open_checkpoint(tmp_path / "one")
