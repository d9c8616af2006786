"""What the configs say of generation and prompt template, and what a user may say instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import invoke
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.checkpoint.variants import CONVERSATION_NAMES, NVILA_KEYS, TRAINED_FROM
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

FIRST_8B, FIX = (
    "./checkpoints/vila-siglip-llama3-8b-pretrain_r4/llm",
    "/home/someone/runs/july3/llama3_8b/mmc4_coyo/stage3/llm",
)
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>")  # fmt: skip
# What NVILA's code writes under each of its keys.
NVILA_VALUES: dict[str, Any] = {
    "num_time_tokens": 0, "time_token_format": "<t{t}>", "time_token_ids": [], "soft_ce_std": 1.0,
    "dynamic_s2": False, "min_tiles": 1, "max_tiles": 12, "vision_tower_lr": 2e-5,
    "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
    "video_encoder": '{"_target_": "llava.model.encoders.BasicVideoEncoder"}',
}  # fmt: skip


def prompt_of(root: Path, template: str | None = None) -> str:
    config = load_config(root, template)
    return ModelInfo.from_config(config, load_tokenizer(root / "llm")).prompt


@pytest.mark.parametrize("name", CONVERSATION_NAMES)
def test_a_conversation_of_the_root_config_is_mapped(name: str, tmp_path: Path) -> None:
    """As the *-hf-preview repositories and VILA's own export name it."""
    root = make_checkpoint(tmp_path / "c", root_config={"chat_template": name})
    assert prompt_of(root) == (CONVERSATION_NAMES[name] or "vicuna_v1")
    assert prompt_of(root, "hermes-2") == "hermes-2"
    assert load_config(root).generation == "vila1.5"


def test_no_conversation_is_no_name(tmp_path: Path) -> None:
    """NVILA's root configs have the key, with null."""
    root = make_checkpoint(tmp_path / "c", qwen2=True)
    values = json.loads((root / "config.json").read_text("utf-8"))
    (root / "config.json").write_text(json.dumps({**values, "chat_template": None}), "utf-8")
    assert load_config(root).prompt_template is None
    assert prompt_of(root) == "qwen2"


@pytest.mark.parametrize("name", ["mistral", "plain", "vicuna", "{{ messages }}", 3, ["vicuna_v1"]])
def test_an_unknown_conversation_is_refused_with_advice_that_works(
    name: Any, tmp_path: Path
) -> None:
    root = make_checkpoint(tmp_path / "c", root_config={"chat_template": name})
    with pytest.raises(VilaDeployError, match="chat_template: ") as caught:
        load_config(root)
    assert "\n" not in str(caught.value)
    assert prompt_of(root, "llama_3") == "llama_3"
    values = json.loads((root / "config.json").read_text("utf-8"))
    values["prompt_template"] = "hermes-2"
    (root / "config.json").write_text(json.dumps(values), "utf-8")
    assert prompt_of(root) == "hermes-2"


@pytest.mark.parametrize("command", ["vila-quantize", "vila-build-engine"])
def test_the_advice_works_in_every_command(command: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", root_config={"chat_template": "mistral"})
    flags = ["--plan", *(["--target", "cpu"] if command == "vila-build-engine" else [])]
    refused = invoke(command, root, *flags)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "--prompt-template" in refused.stderr
    assert invoke(command, root, *flags, "--prompt-template", "vicuna_v1").returncode == 0


def test_what_was_asked_for_stays_in_the_output(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", layers=1, root_config={"chat_template": "mistral"})
    out = tmp_path / "q"
    asked = ("--prompt-template", "hermes-2")
    assert invoke("vila-quantize", root, "-o", out, "--algorithm", "rtn", "--no-eval",
                  "--group-size", 64, *asked).returncode == 0  # fmt: skip
    assert prompt_of(out) == "hermes-2"


@pytest.mark.parametrize(
    ("path", "named", "expected"),
    [
        (FIRST_8B, None, "llama_3_original"),
        (FIRST_8B, "llama_3", "llama_3_original"),
        (FIRST_8B, "auto", "llama_3_original"),
        (FIX, None, "llama_3"),
        (FIX, "llama_3", "llama_3"),
        (None, None, "llama_3"),
        (3, None, "llama_3"),
        (FIRST_8B + "/", None, "llama_3"),
    ],
)
def test_the_first_llama_3_is_told_by_where_its_training_began(
    path: Any, named: str | None, expected: str, tmp_path: Path
) -> None:
    root = make_checkpoint(
        tmp_path / "c",
        added_tokens=LLAMA_3,
        llm_config={"_name_or_path": path},
        root_config={"chat_template": named},
    )
    assert prompt_of(root) == expected
    assert prompt_of(root, "llama_3") == "llama_3"
    # A folder's own name means nothing.
    shutil.move(root, tmp_path / "pretrain_r4")
    assert prompt_of(tmp_path / "pretrain_r4") == expected
    assert set(TRAINED_FROM) == {FIRST_8B}


@pytest.mark.parametrize("key", NVILA_KEYS)
def test_a_llama_in_nvilas_layout_gets_nvilas_recipe(key: str, tmp_path: Path) -> None:
    values = {key: NVILA_VALUES[key]}
    root = make_checkpoint(tmp_path / "c", root_config=values)
    with pytest.raises(VilaDeployError, match="--prompt-template"):
        load_config(root)
    config = load_config(root, "vicuna_v1")
    assert (config.generation, config.token_order, config.image_end) == ("nvila", "row", "\n")
    plain = load_config(make_checkpoint(tmp_path / "plain"))
    assert (plain.generation, plain.token_order, plain.image_end) == ("vila1.5", "column", "")
    # Their code leaves keys that it doesn't use null.
    unset = make_checkpoint(tmp_path / "unset")
    root_values = json.loads((unset / "config.json").read_text("utf-8"))
    (unset / "config.json").write_text(json.dumps({**root_values, key: None}), "utf-8")
    assert load_config(unset) == plain


def test_a_qwen2_without_nvilas_keys_is_of_its_generation(tmp_path: Path) -> None:
    """As LongVILA's: its code was between VILA1.5 and NVILA, which runs it now."""
    config = load_config(make_checkpoint(tmp_path / "c", qwen2=True))
    assert (config.generation, config.token_order, config.image_end) == ("nvila", "row", "\n")
