"""Configs that are wrong, or that the tensors don't agree with: one line that names the key."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.damage import (
    LLM,
    PROJECTOR,
    Q_PROJ,
    TOWER,
    Damage,
    edit_bytes,
    edit_tensors,
    refused,
    remove,
    set_key,
    write,
)
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint

# (overrides of the checkpoint, damage, what the message must hold)
CASES: dict[str, tuple[dict[str, Any], Damage, str]] = {
    # Tensors against the configs
    "tensor missing": (
        {},
        edit_tensors(LLM, lambda tensors: tensors.pop(f"{Q_PROJ}.weight")),
        rf"llm: tensor {Q_PROJ}\.weight is missing; download",
    ),
    "tensor unknown": (
        {},
        edit_tensors(LLM, lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.ones(128)})),
        rf"{LLM}: tensor {Q_PROJ}\.bias is not part of .*; correct llm/config\.json",
    ),
    "layer too many": (
        {"llm_config": {"num_hidden_layers": 1}},
        lambda root: None,
        rf"{LLM}: tensor model\.layers\.1\S+ is not part of .*; correct llm/config\.json",
    ),
    "layer too few": (
        {"llm_config": {"num_hidden_layers": 1024}},
        lambda root: None,
        r"llm: tensor model\.layers\.2\S+ is missing; .*correct config\.json",
    ),
    "tower layer too many": (
        {"vision_config": {"num_hidden_layers": 2}},
        lambda root: None,
        rf"{TOWER}: tensor vision_model\.encoder\.layers\.2\S+ is not part of .*; correct",
    ),
    "wrong shape": (
        {},
        edit_tensors(LLM, lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.ones(2, 2)})),
        rf"{LLM}: tensor {Q_PROJ}\.weight is \[2, 2\], config\.json asks for \[128, 128\]; correct",
    ),
    "wrong dtype": (
        {},
        edit_tensors(
            LLM, lambda tensors: tensors.update({"model.norm.weight": torch.ones(128).long()})
        ),
        rf"{LLM}: tensor model\.norm\.weight is I64, must be F16 or BF16 or F32; convert",
    ),
    "8-bit floats": (
        {},
        edit_tensors(
            PROJECTOR,
            lambda tensors: tensors.update(
                {"layers.4.bias": tensors["layers.4.bias"].to(torch.float8_e4m3fn)}
            ),
        ),
        rf"{PROJECTOR}: tensor layers\.4\.bias is F8_E4M3, must be .*; convert",
    ),
    "4-bit tensors of the wrong shape": (
        {"quantized": True, "group_size": 64, "llm_config": {}},
        edit_tensors(
            LLM, lambda tensors: tensors.update({f"{Q_PROJ}.scales": torch.ones(1, 128).half()})
        ),
        rf"{LLM}: tensor {Q_PROJ}\.scales is \[1, 128\], .* \[2, 128\]; correct",
    ),
    "4-bit config, fp weights": (
        {},
        set_key(
            "llm/config.json",
            "quantization_config",
            {"quant_method": "awq", "bits": 4, "group_size": 64},
        ),
        rf"llm: tensor {Q_PROJ}\.qweight is missing; .*config\.json",
    ),
    "fp config, 4-bit weights": (
        {"quantized": True, "llm_config": {"quantization_config": None}},
        lambda root: None,
        rf"llm: tensor {Q_PROJ}\.weight is missing; .*config\.json",
    ),
    "tied in the config only": (
        {"tied": True, "llm_config": {"tie_word_embeddings": False}},
        lambda root: None,
        r"llm: tensor lm_head\.weight is missing; .*config\.json",
    ),
    "everything huge": (
        {
            "llm_config": dict.fromkeys(
                ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 10**6
            ),
            "root_config": {"hidden_size": 10**6},
        },
        lambda root: None,
        rf"llm/config\.json: head_dim: must be an integer in .*; correct|{LLM}: tensor .*; correct",
    ),
    # Families
    "unknown LLM": (
        {"llm_config": {"architectures": ["GPT2LMHeadModel"]}},
        lambda root: None,
        r"llm/config\.json: architectures: unknown LLM family 'GPT2LMHeadModel'; .*LlamaFor",
    ),
    "LLM without a name": (
        {"llm_config": {"architectures": [["x"]]}},
        lambda root: None,
        r"llm/config\.json: architectures: unknown LLM family .*; .*LlamaForCausalLM",
    ),
    "unknown tower": (
        {"vision_config": {"model_type": "radio"}},
        lambda root: None,
        r"vision_tower/config\.json: model_type: unknown vision tower 'radio'; .*sig",
    ),
    "unknown projector": (
        {"projector_config": {"mm_projector_type": "resampler"}},
        lambda root: None,
        r"mm_projector/config\.json: mm_projector_type: unknown projector 'resampler'; .*mlp_",
    ),
    "unknown quantization": (
        {"quantized": True, "llm_config": {"quantization_config": {"quant_method": "gptq"}}},
        lambda root: None,
        r"quantization_config\.quant_method: unknown quantization method 'gptq'; .*awq",
    ),
    "group size that does not divide": (
        {
            "quantized": True,
            "llm_config": {
                "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 48}
            },
        },
        lambda root: None,
        r"llm/config\.json: quantization_config\.group_size: 48 does not divide hidden_size 128; ",
    ),
    # JSON
    "config empty": ({}, write("config.json", b""), r"config\.json: is not valid JSON.*; download"),
    "config no object": ({}, write("config.json", b"[1]"), r"config\.json: holds no.*; download"),
    "config with BOM": (
        {},
        edit_bytes("llm/config.json", lambda content: b"\xef\xbb\xbf" + content),
        r"llm/config\.json: is not valid JSON .*BOM.*; download",
    ),
    "config in UTF-16": (
        {},
        edit_bytes("llm/config.json", lambda content: content.decode().encode("utf-16")),
        r"llm/config\.json: is not valid JSON .*; download",
    ),
    "config nested deep": (
        {},
        write("config.json", b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
        r"config\.json: is not valid JSON .*recursion.*; download",
    ),
    "config key twice": (
        {},
        write("config.json", b'{"s2": false, "s2": true}'),
        r"config\.json: is not valid JSON .*'s2' occurs twice.*; download",
    ),
    "config huge": (
        {},
        write("config.json", b" " * (17 << 20)),
        r"config\.json: larger than \d+ bytes; download",
    ),
    "config number too long": (
        {},
        write("config.json", b'{"hidden_size": ' + b"9" * 10**5 + b"}"),
        r"config\.json: is not valid JSON .*; download",
    ),
    "config is a folder": (
        {},
        lambda root: ((root / "config.json").unlink(), (root / "config.json").mkdir()),
        r"config\.json: is no regular file; download",
    ),
    "config is a link to itself": (
        {},
        lambda root: (
            (root / "config.json").unlink(),
            (root / "config.json").symlink_to("config.json"),
        ),
        r"config\.json: cannot be read \(.*; check its permissions",
    ),
    "part is a file": (
        {},
        lambda root: (remove("mm_projector")(root), (root / "mm_projector").touch()),
        r"part mm_projector/ is missing; download",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_open_refuses(case: str, tmp_path: Path) -> None:
    overrides, damage, message = CASES[case]
    root = make_checkpoint(tmp_path / "c", **overrides)
    damage(root)
    assert re.search(message, refused(root))


ADAPTER = (
    r": is a LoRA adapter of {}, not a checkpoint; vila-quantize BASE --lora ADAPTER merges it"
)
OTHER_FOLDERS = {
    "lora": "lora" + ADAPTER.format("Efficient-Large-Model/VILA1.5-3b"),
    "lora without config": "config" + ADAPTER.format("its base model"),
    "lora of llm/": "llm" + ADAPTER.format("base"),
    "engine": r"engine: is an engine, not a checkpoint; give the checkpoint's folder",
    "root/llm": r"root/llm: is one part of a checkpoint; give the folder \S+/root$",
    "cache": r"cache: holds no config\.json; give the folder \S+/cache/snapshots/0123$",
    "formats": r"formats: holds no config\.json; give the folder \S+/formats/awq$",
    "empty": r"empty: holds no config\.json; give the checkpoint's folder$",
    "root/config.json": r"config\.json: is a file; give the checkpoint's folder",
    "none": r"none: no such folder; give the checkpoint's folder$",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and folders of other kinds that people have around one."""
    top = tmp_path_factory.mktemp("folders")
    root = make_checkpoint(top / "root")
    for made in ("engine/llm", "cache/snapshots", "formats", "empty"):
        (top / made).mkdir(parents=True)
    (top / "engine" / "manifest.json").write_text("{}")
    (top / "cache" / "snapshots" / "0123").symlink_to(root)
    (top / "formats" / "awq").symlink_to(root)
    for name, base in (
        ("lora", "Efficient-Large-Model/VILA1.5-3b"),
        ("lora without config", None),
        ("lora of llm/llm", "base"),
    ):
        (top / name).mkdir(parents=True)
        adapter = {"peft_type": "LORA", "base_model_name_or_path": base}
        (top / name / "adapter_config.json").write_text(json.dumps(adapter))
        for file in ("adapter_model.safetensors", "non_lora_trainables.bin"):
            (top / name / file).touch()
    (top / "lora" / "config.json").write_text("{}")
    return top


def test_a_checkpoint_may_keep_the_config_of_a_merged_adapter(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    for folder in (root, root / "llm"):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    open_checkpoint(root)


@pytest.mark.parametrize("name", OTHER_FOLDERS)
def test_another_folder_says_which_to_give(name: str, folders: Path) -> None:
    assert re.search(OTHER_FOLDERS[name], refused(folders / name))


def test_a_hubs_name_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(Path("VILA1.5-3b")).endswith("such as Efficient-Large-Model/VILA1.5-3b")
    make_checkpoint(tmp_path / "root")
    monkeypatch.chdir(tmp_path / "root" / "llm")
    assert refused(Path()).endswith(f"give the folder {tmp_path / 'root'}")


# (file, key, hostile value); the message must name both file and key
HOSTILE_VALUES = [
    ("llm/config.json", "hidden_size", True),
    ("llm/config.json", "hidden_size", 128.0),
    ("llm/config.json", "hidden_size", "128"),
    ("llm/config.json", "hidden_size", 10**400),
    ("llm/config.json", "num_hidden_layers", 10**6),
    ("llm/config.json", "num_attention_heads", 0),
    ("llm/config.json", "num_attention_heads", 3),
    ("llm/config.json", "num_key_value_heads", 3),
    ("llm/config.json", "head_dim", 31),
    ("llm/config.json", "rope_theta", float("nan")),
    ("llm/config.json", "rope_theta", 10**400),
    ("llm/config.json", "rope_scaling", {"type": "linear"}),
    ("llm/config.json", "rope_scaling", {"type": "linear", "factor": 0.5}),
    ("llm/config.json", "rope_scaling", {"type": "linear", "factor": "2"}),
    ("llm/config.json", "rope_scaling", {"rope_type": "linear", "factor": float("nan")}),
    ("llm/config.json", "rope_scaling", {"type": 2, "factor": 2.0}),
    ("llm/config.json", "rope_scaling", {"type": "x" * 10**5}),
    ("llm/config.json", "rms_norm_eps", float("inf")),
    ("llm/config.json", "rms_norm_eps", 0),
    ("llm/config.json", "hidden_act", "relu"),
    ("llm/config.json", "attention_bias", True),
    ("llm/config.json", "eos_token_id", [2, True]),
    ("llm/config.json", "eos_token_id", -1),
    ("llm/config.json", "bos_token_id", 10**9),
    ("llm/config.json", "model_max_length", -1),
    ("llm/config.json", "quantization_config", []),
    ("llm/config.json", "tie_word_embeddings", 0),
    ("llm/generation_config.json", "eos_token_id", ["</s>"]),
    ("vision_tower/config.json", "num_channels", 1),
    ("vision_tower/config.json", "patch_size", 43),
    ("vision_tower/config.json", "hidden_act", "relu"),
    ("vision_tower/preprocessor_config.json", "size", {"longest_edge": 42}),
    ("vision_tower/preprocessor_config.json", "size", {"height": 42, "width": 43}),
    ("vision_tower/preprocessor_config.json", "image_mean", [0.5, 0.5]),
    ("vision_tower/preprocessor_config.json", "image_std", [0.5, 0.5, 0]),
    ("vision_tower/preprocessor_config.json", "image_std", [0.5, 0.5, True]),
    ("vision_tower/preprocessor_config.json", "image_mean", [0.5, 0.5, 10**400]),
    ("vision_tower/preprocessor_config.json", "rescale_factor", 0),
    ("vision_tower/preprocessor_config.json", "do_normalize", False),
    ("config.json", "mm_vision_select_layer", -4),
    ("config.json", "mm_vision_select_layer", 4),
    ("config.json", "mm_vision_select_layer", 0),
    ("config.json", "mm_vision_select_feature", "patch"),
    ("config.json", "mm_vision_select_feature", "\ud800\n"),
    ("config.json", "image_aspect_ratio", "anyres"),
    ("config.json", "mm_projector_token_order", "diagonal"),
    ("config.json", "s2", True),
    ("config.json", "mm_use_im_start_end", True),
    ("config.json", "hidden_size", 127),
    ("config.json", "mm_hidden_size", 65),
]


@pytest.mark.parametrize(("file", "key", "value"), HOSTILE_VALUES)
def test_config_value_is_refused(file: str, key: str, value: Any, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    set_key(file, key, value)(root)
    message = refused(root)
    assert message.startswith(f"{root / file}: {key}")
    assert "; " in message
