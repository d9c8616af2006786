"""Wrong or not yet supported variants: one line each, with file, key and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.damage import PROJECTOR, Q_PROJ, Damage, edit_tensors, refused, set_key, write
from tests.support.prompt_cases import write_tokenizer
from tests.support.tiny import PROJECTORS, make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

LLM, ROOT = "llm/config.json", "config.json"
TOWER, PROJECTOR_CONFIG = "vision_tower/config.json", "mm_projector/config.json"
PREPROCESSOR = "vision_tower/preprocessor_config.json"


def pop(file: str, name: str) -> Damage:
    return edit_tensors(file, lambda tensors: tensors.pop(name))


def put(file: str, name: str, tensor: torch.Tensor) -> Damage:
    return edit_tensors(file, lambda tensors: tensors.update({name: tensor}))


WEIGHTS = "llm/model.safetensors"
QWEN2: dict[str, tuple[Damage, str]] = {
    "no heads": (set_key(LLM, "num_attention_heads", 0), r"num_attention_heads: must be an int"),
    "heads that do not divide": (
        set_key(LLM, "num_attention_heads", 3),
        r"num_attention_heads: 3 does not divide hidden_size 128",
    ),
    "key heads that do not divide": (
        set_key(LLM, "num_key_value_heads", 3),
        r"num_key_value_heads: 3 does not divide 4 heads",
    ),
    "negative size": (set_key(LLM, "hidden_size", -128), r"hidden_size: must be an integer"),
    "size as text": (set_key(LLM, "intermediate_size", "256"), r"intermediate_size: must be an"),
    "no vocabulary": (set_key(LLM, "vocab_size", None), r"vocab_size: is missing"),
    "sliding window": (
        set_key(LLM, "use_sliding_window", True),
        r"use_sliding_window: sliding-window attention is not supported",
    ),
    "no biases": (set_key(LLM, "attention_bias", False), r"attention_bias: qwen2 always has true"),
    "biases in the MLP": (set_key(LLM, "mlp_bias", True), r"mlp_bias: qwen2 always has false"),
    "stretched rope": (
        set_key(LLM, "rope_scaling", {"type": "yarn", "factor": 4.0}),
        r"rope_scaling: rope type 'yarn' is not supported",
    ),
    "stop token outside": (set_key(LLM, "eos_token_id", 10**9), r"eos_token_id: must hold integer"),
    "bias missing": (pop(WEIGHTS, f"{Q_PROJ}.bias"), rf"llm: tensor {Q_PROJ}\.bias is missing"),
    "bias too short": (
        put(WEIGHTS, f"{Q_PROJ}.bias", torch.zeros(64)),
        rf"tensor {Q_PROJ}\.bias is \[64\], config\.json asks for \[128\]",
    ),
    "bias of the output": (
        put(WEIGHTS, Q_PROJ.replace("q_proj", "o_proj.bias"), torch.zeros(128)),
        r"tensor model\.layers\.0\.self_attn\.o_proj\.bias is not part of the model",
    ),
    "another family's name": (
        set_key(LLM, "architectures", ["Qwen2MoeForCausalLM"]),
        r"architectures: unknown LLM family 'Qwen2MoeForCausalLM'; .*LlamaForCausalLM, Qwen2For",
    ),
}


@pytest.mark.parametrize("case", QWEN2)
def test_qwen2_refuses(case: str, tmp_path: Path) -> None:
    damage, message = QWEN2[case]
    root = make_checkpoint(tmp_path / "c", qwen2=True)
    damage(root)
    assert re.search(message, refused(root))


LLAMA: dict[str, tuple[Damage, str]] = {
    "biases": (set_key(LLM, "attention_bias", True), r"attention_bias: llama always has false"),
    "rope that grows": (
        set_key(LLM, "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        r"rope_scaling: rope type 'llama3' is not supported",
    ),
    "no rope base": (set_key(LLM, "rope_theta", 0), r"rope_theta: must be a number in 1\.0"),
    "more key heads than heads": (
        set_key(LLM, "num_key_value_heads", 8),
        r"num_key_value_heads: 8 does not divide 4 heads",
    ),
    "no key heads": (set_key(LLM, "num_key_value_heads", 0), r"num_key_value_heads: must be an"),
    "vocabulary of other tensors": (
        set_key(LLM, "vocab_size", 128256),
        r"tensor model\.embed_tokens\.weight is \[384, 128\], config\.json asks for \[128256, 128",
    ),
    "a billion layers": (set_key(LLM, "num_hidden_layers", 10**9), r"num_hidden_layers: must be"),
    "template unknown": (
        set_key(ROOT, "prompt_template", "vicuna_v0"),
        r"prompt_template: unknown prompt template 'vicuna_v0'; .*hermes-2, llama_3, llama_3_orig",
    ),
    "template no name": (set_key(ROOT, "prompt_template", ["qwen2"]), r"prompt_template: must be"),
    "stops no numbers": (set_key(LLM, "eos_token_id", "</s>"), r"eos_token_id: must hold integers"),
}


@pytest.mark.parametrize("case", LLAMA)
def test_llama_refuses(case: str, tmp_path: Path) -> None:
    damage, message = LLAMA[case]
    root = make_checkpoint(tmp_path / "c")
    damage(root)
    assert re.search(message, refused(root))


TOWER_WEIGHTS = "vision_tower/model.safetensors"
# What every tower must refuse, and what is particular to one.
EVERY_TOWER: dict[str, tuple[Damage, str]] = {
    "no heads": (set_key(TOWER, "num_attention_heads", 0), r"num_attention_heads: must be an int"),
    "heads that do not divide": (
        set_key(TOWER, "num_attention_heads", 5),
        r"num_attention_heads: 5 does not divide hidden_size 64",
    ),
    "negative size": (set_key(TOWER, "hidden_size", -64), r"hidden_size: must be an integer"),
    "size as text": (set_key(TOWER, "intermediate_size", "128"), r"intermediate_size: must be an"),
    "no patches": (set_key(TOWER, "patch_size", None), r"patch_size: is missing"),
    "patch larger than the image": (
        set_key(TOWER, "patch_size", 64), r"patch_size: 64 is larger than image_size 42",
    ),
    "a billion layers": (set_key(TOWER, "num_hidden_layers", 10**9), r"num_hidden_layers: must be"),
    "layer that is not there": (
        set_key(ROOT, "mm_vision_select_layer", -9), r"mm_vision_select_layer: -9 is outside",
    ),
    "activation": (set_key(TOWER, "hidden_act", "swish"), r"hidden_act: unknown activation 'swish"),
    "four channels": (set_key(TOWER, "num_channels", 4), r"num_channels: must be 3"),
    "no spread": (
        set_key(PREPROCESSOR, "image_std", [0.5, 0.0, 0.5]), r"image_std: must be positive",
    ),
}  # fmt: skip
ONE_TOWER: dict[str, dict[str, tuple[Damage, str]]] = {
    "siglip": {
        "pixels of another tower": (
            set_key(PREPROCESSOR, "size", {"height": 56, "width": 56}),
            r"preprocessor makes 56 pixels, 42 are needed",
        ),
        "class token": (
            set_key(ROOT, "mm_vision_select_feature", "patch"),
            r"mm_vision_select_feature: 'patch' doesn't fit siglip, which has no class token",
        ),
    },
    "clip": {
        "class token kept": (
            set_key(ROOT, "mm_vision_select_feature", "cls_patch"),
            r"mm_vision_select_feature: 'cls_patch' doesn't fit clip, which has a class token",
        ),
        "no class token": (
            pop(TOWER_WEIGHTS, "vision_model.embeddings.class_embedding"),
            r"tensor vision_model\.embeddings\.class_embedding is missing",
        ),
        "another size before the crop": (
            set_key(PREPROCESSOR, "size", {"shortest_edge": 96}), r"size: the shorter side must be",
        ),
        "no crop": (
            set_key(PREPROCESSOR, "do_center_crop", False), r"do_center_crop: the middle",
        ),
        "crop no square": (
            set_key(PREPROCESSOR, "crop_size", {"height": 42, "width": 40}),
            r"crop_size: must be square, found 42 by 40",
        ),
    },
    "internvit": {
        "no scale": (
            pop(TOWER_WEIGHTS, "encoder.layers.1.ls2"), r"encoder\.layers\.1\.ls2 is missing",
        ),
        "another norm": (set_key(TOWER, "norm_type", "layer_norm"), r"norm_type: only rms_norm"),
        "bias that is not there": (
            set_key(TOWER, "qkv_bias", True), r"encoder\.layers\.0\.attn\.qkv\.bias is missing",
        ),
        "norms nobody asked for": (
            set_key(TOWER, "qk_normalization", False), r"[qk]_norm\.weight is not part",
        ),
        "flag as text": (set_key(TOWER, "qkv_bias", "no"), r"qkv_bias: must be true or false"),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("tower", "case"),
    [(tower, case) for tower, own in ONE_TOWER.items() for case in (*EVERY_TOWER, *own)],
)
def test_tower_refuses(tower: str, case: str, tmp_path: Path) -> None:
    damage, message = (EVERY_TOWER | ONE_TOWER[tower])[case]
    root = make_checkpoint(tmp_path / "c", tower=tower)
    damage(root)
    assert re.search(message, refused(root))


STATIC = {"s2": True, "s2_scales": "42,84", "s2_max_split_size": 42}
DYNAMIC_S2 = {
    "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "42,84,126",
    "s2_max_split_size": 42, "s2_resize_output_to_scale_idx": -1, "prompt_template": "qwen2",
}  # fmt: skip
# Root keys, what is wrong, and how often the scales widen the projector.
TILING: dict[str, tuple[dict[str, object], str]] = {
    "flag as text": ({"s2": "yes"}, r"s2: must be true or false, found 'yes'"),
    "no scales": ({**STATIC, "s2_scales": None}, r"s2_scales: must be 1 to 8 sizes"),
    "scales are words": ({**STATIC, "s2_scales": "small,large"}, r"s2_scales: must be 1 to 8"),
    "scales are fractions": ({**STATIC, "s2_scales": [42, 84.5]}, r"s2_scales: must be 1 to 8"),
    "scale zero": ({**STATIC, "s2_scales": "0,42"}, r"s2_scales: must be 1 to 8"),
    "negative scale": ({**STATIC, "s2_scales": "-42,42"}, r"s2_scales: must be 1 to 8"),
    "scales that do not divide": (
        {**STATIC, "s2_scales": "42,100"}, r"s2_scales: \[42, 100\] must be multiples of the",
    ),
    "first scale too large": ({**STATIC, "s2_scales": "84,168"}, r"s2_scales: \[84, 168\] must be"),
    "scale of 10^9 tiles": ({**STATIC, "s2_scales": "42,1328156"}, r"s2_scales: must be 1 to 8"),
    "split of another size": (
        {**STATIC, "s2_max_split_size": 21}, r"s2_max_split_size: 21 differs from the tower's 42",
    ),
    "output scale outside": (
        {**STATIC, "s2_resize_output_to_scale_idx": 2}, r"s2_resize_output_to_scale_idx: must be",
    ),
    "pixels of the small scale": (STATIC, r"preprocessor makes 42 pixels, 84 are needed"),
    "10^9 tiles": ({**DYNAMIC_S2, "max_tiles": 10**9}, r"max_tiles: must be"),
    "no tiles": ({**DYNAMIC_S2, "max_tiles": 0}, r"max_tiles: must be an integer"),
    "fewer tiles than the scale has": (
        {**DYNAMIC_S2, "max_tiles": 8}, r"max_tiles: 8 is fewer than the 9 tiles",
    ),
    "mode without its flag": (
        {**DYNAMIC_S2, "dynamic_s2": False}, r"dynamic_s2: must be true, as image_aspect_ratio",
    ),
    "scales without their mode": (
        {**DYNAMIC_S2, "image_aspect_ratio": "resize"}, r"dynamic_s2: must be false, as image_asp",
    ),
    "static scales of dynamic tiles": (
        {**STATIC, "image_aspect_ratio": "dynamic"}, r"s2: must be false, as image_aspect_ratio",
    ),
    "PS3": ({"ps3": True}, r"ps3: PS3 towers \(VILA-HD\) are not supported"),
    "no frames": ({"num_video_frames": 0}, r"num_video_frames: must be an integer"),
    "more least than most": (
        {"image_aspect_ratio": "dynamic", "min_tiles": 5, "max_tiles": 4},
        r"max_tiles: must be in min_tiles 5\.\.64, found 4",
    ),
    "tiles as a list": ({"image_aspect_ratio": "dynamic", "max_tiles": [12]}, r"max_tiles: must"),
    "10^9 dynamic tiles": ({"image_aspect_ratio": "dynamic", "max_tiles": 10**9}, r"max_tiles: mu"),
    "width of one scale": (
        {**DYNAMIC_S2, "mm_hidden_size": 64}, r"mm_hidden_size: 64 differs from its part's 192",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TILING)
def test_tiling_refuses(case: str, tmp_path: Path) -> None:
    changes, message = TILING[case]
    root = make_checkpoint(tmp_path / "c", root_config=changes)
    assert re.search(message, refused(root))


# What VILA releases have and this version has not.
UNSUPPORTED: dict[str, tuple[str, str, Any, str]] = {
    "mode": (ROOT, "image_aspect_ratio", "anyres", r"image_aspect_ratio: unknown image mode 'anyr"),
    "tower": (TOWER, "model_type", "radio", r"model_type: unknown vision tower 'radio'; .*siglip"),
    "S2 projector": (
        PROJECTOR_CONFIG, "mm_projector_type", "mlp_downsample_3x3_s2",
        r"mm_projector_type: unknown projector 'mlp_downsample_3x3_s2'; .*mlp_downsample_3x3_fix",
    ),
    "markers": (ROOT, "mm_use_im_start_end", True, r"mm_use_im_start_end: markers around images"),
    "mixture": (LLM, "architectures", ["MixtralForCausalLM"], r"architectures: unknown LLM family"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_is_said(case: str, tmp_path: Path) -> None:
    file, key, value, message = UNSUPPORTED[case]
    root = make_checkpoint(tmp_path / "c", qwen2=True)
    set_key(file, key, value)(root)
    assert re.search(message, refused(root))


@pytest.mark.parametrize("given", PROJECTORS)
@pytest.mark.parametrize("named", PROJECTORS)
def test_projector_must_be_the_named_one(named: str, given: str, tmp_path: Path) -> None:
    """The two downsampling by 2 hold the same tensors; any other pair differs."""
    changes = {"mm_projector_type": named}
    root = make_checkpoint(tmp_path / "c", projector=given, projector_config=changes)
    same = {"mlp_downsample", "mlp_downsample_2x2_fix"}
    if named == given or {named, given} == same:
        assert set(open_checkpoint(root).projector.names()) == set(load_file(root / PROJECTOR))
    else:
        assert re.search(r"mm_projector.*: tensor layers\S+ is ", refused(root))


TOKENIZER_FILES: dict[str, tuple[str, bytes]] = {
    "another class": ("tokenizer_config.json", b'{"tokenizer_class": "GPT2Tokenizer"}'),
    "no settings": ("tokenizer_config.json", b"{}"),
    "settings no object": ("tokenizer_config.json", b"[]"),
    "vocabulary a list": ("vocab.json", b"[1, 2]"),
    "vocabulary damaged": ("vocab.json", b'{"a": "b"}'),
    "vocabulary empty": ("vocab.json", b""),
    "merges of unknown pieces": ("merges.txt", b"#version: 0.2\nxx yy\n"),
    "merges not text": ("merges.txt", b"\xff\xfe\x00"),
    "added token at a taken id": ("added_tokens.json", b'{"<|im_start|>": 3}'),
    "added token far away": ("added_tokens.json", b'{"<|im_start|>": 999999}'),
    "added token without an id": ("added_tokens.json", b'{"<|im_start|>": null}'),
    "added tokens no object": ("added_tokens.json", b'"x"'),
}


@pytest.mark.parametrize("case", TOKENIZER_FILES)
def test_damaged_vocabulary_gives_one_line(case: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    name, content = TOKENIZER_FILES[case]
    write(name, content)(tmp_path)
    with pytest.raises(VilaDeployError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path))
    assert "; " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "decoder", [{"x": {"content": "a"}}, {"7": {}}, {"7": "a"}, {"-1": {"content": "a"}}, [1]]
)
def test_damaged_added_tokens_give_one_line(decoder: Any, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "hermes-2")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["added_tokens_decoder"] = decoder
    file.write_text(json.dumps(settings), "utf-8")
    with pytest.raises(VilaDeployError, match=r"added_tokens_decoder.*; ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
