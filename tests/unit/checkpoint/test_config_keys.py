"""Each key that the originals read is honoured, refused in one line, or without effect."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tests.support import config_keys
from tests.support.config_keys import (
    GENERATION,
    HONOURED,
    KEYS,
    LLM,
    NO_EFFECT,
    PREPROCESSOR,
    PROJECTOR,
    REFUSED,
    ROOT,
    TOKENIZER,
    TOWER,
    Key,
)
from tests.support.paths import REPOSITORY
from tests.support.prompt_cases import write_tokenizer
from tests.support.released_configs import RELEASED, write_configs
from tests.support.tiny import flatten, make_checkpoint
from vila_deploy.checkpoint.config import VilaConfig, config_of
from vila_deploy.checkpoint.folder_layout import Layout, find_layout
from vila_deploy.processing.own_template import template_note
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

S2 = {"s2": True, "s2_scales": "42,84", "s2_max_split_size": 42}
BASES: dict[str, dict[str, Any]] = {
    "siglip": {},
    "clip": {"tower": "clip"},
    "internvit": {"tower": "internvit"},
    "qwen2": {"qwen2": True},
    "dynamic": {"root_config": {"image_aspect_ratio": "dynamic"}},
    "s2": {"scales": 2, "root_config": S2,
           "preprocessor_config": {"size": {"height": 84, "width": 84}}},
    "no length": {"llm_config": {"model_max_length": None}},
    "flat": {"root_config": {"mm_hidden_size": 1152}},
}  # fmt: skip
PARTS = {ROOT: "fields", LLM: "llm", GENERATION: "generation", TOWER: "vision",
         PREPROCESSOR: "preprocessor", PROJECTOR: "projector"}  # fmt: skip
CONFIG_KEYS = [key for key in KEYS if key.file in PARTS]
TOKENIZER_KEYS = [key for key in KEYS if key.file not in PARTS]
PROBES = ("What is this?", " two  spaces\n", "<s>hi</s> a . b", "! !", "<new>", "the <unk> in")


def key_id(key: Key) -> str:
    return f"{key.file}-{key.name}-{key.base}"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layout]:
    folder = tmp_path_factory.mktemp("bases")
    found = {}
    for name, changes in BASES.items():
        root = make_checkpoint(folder / name.replace(" ", "-"), **changes)
        if name == "flat":
            flatten(root, "google/siglip-so400m-patch14-384")
        found[name] = find_layout(root)
    return found


def outcome(layout: Layout) -> VilaConfig | str:
    """What is made of the configs: a description, or the one line that refuses them."""
    try:
        return config_of(layout)
    except VilaDeployError as error:
        return str(error)


@pytest.mark.parametrize("key", CONFIG_KEYS, ids=key_id)
def test_keys_of_configs(key: Key, layouts: dict[str, Layout]) -> None:
    base = layouts[key.base]
    part = PARTS[key.file]
    fields: Fields = getattr(base, part)
    if key.base == "flat":
        values = {**json.loads((base.root / "config.json").read_text()), key.name: key.value}
        copy = base.root.with_name("flat-copy")
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        (copy / "config.json").write_text(json.dumps(values), "utf-8")
        changed: VilaConfig | str
        try:
            changed = outcome(find_layout(copy))
        finally:
            shutil.rmtree(copy)
    else:
        changed_fields = Fields({**fields.values, key.name: key.value}, fields.source)
        changed = outcome(replace(base, **{part: changed_fields}))
    check(key, outcome(base), changed)


def check(key: Key, before: object, after: object) -> None:
    assert not isinstance(before, str), before
    if key.kind == NO_EFFECT:
        assert after == before
    elif key.kind == HONOURED:
        assert after != before
    else:
        assert isinstance(after, str), f"{key.name} is not refused"
        assert key.name in after
        assert "\n" not in after


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = make_checkpoint(tmp_path_factory.mktemp("tokenizers") / "json", layers=1)
    sentencepiece = root.parent / "sentencepiece"
    shutil.copytree(root, sentencepiece)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (sentencepiece / "llm" / file).unlink()
    write_tokenizer(sentencepiece / "llm", "vicuna_v1")
    no_map = root.parent / "no-map"
    shutil.copytree(root, no_map)
    (no_map / "llm" / "special_tokens_map.json").unlink()
    two = root.parent / "two"
    shutil.copytree(sentencepiece, two)
    shutil.copyfile(root / "llm" / "tokenizer.json", two / "llm" / "tokenizer.json")
    cleaned = root.parent / "cleaned"
    shutil.copytree(root, cleaned)
    file = cleaned / "llm" / "tokenizer_config.json"
    settings = {**json.loads(file.read_text("utf-8")), "clean_up_tokenization_spaces": True}
    file.write_text(json.dumps(settings), "utf-8")
    return {"siglip": root, "sentencepiece": sentencepiece, "two": two, "no map": no_map,
            "cleaned": cleaned}  # fmt: skip


def tokenized(root: Path) -> object:
    """What a tokenizer does, and what is said of its chat template; or the line that refuses it."""
    folder = root / "llm"
    try:
        tokenizer = load_tokenizer(folder)
        texts = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size)]
        ids = [tokenizer.encode(probe) for probe in PROBES]
        note = template_note(folder, config_of(find_layout(root)))
    except VilaDeployError as error:
        return str(error)
    return ids, texts, tokenizer.bos_ids, tokenizer.bos_id, tokenizer.vocab_size, note


@pytest.mark.parametrize("key", TOKENIZER_KEYS, ids=key_id)
def test_keys_of_tokenizers(key: Key, tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    root = tokenizer_folders[key.base]
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    file = copy / key.file
    values = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**values, key.name: key.value}), "utf-8")
    check(key, tokenized(root), tokenized(copy))


def known(file: str) -> set[str]:
    return {key.name for key in KEYS if key.file == file}


def test_a_key_has_one_class_for_each_kind_of_model() -> None:
    rows = Counter((key.file, key.name, key.base) for key in KEYS)
    assert [row for row, count in rows.items() if count > 1] == []
    assert {key.kind for key in KEYS} == {HONOURED, REFUSED, NO_EFFECT}


@pytest.mark.parametrize("name", RELEASED)
def test_every_key_of_a_released_configuration_has_a_class(name: str, tmp_path: Path) -> None:
    root = write_configs(tmp_path / "c", RELEASED[name])
    for file in PARTS:
        values = json.loads((root / file).read_text("utf-8"))
        assert values.keys() <= known(file), file


# Keys of the released tokenizer_config.json by kind of tokenizer.
RELEASED_TOKENIZERS = {
    "Llama-2": "add_bos_token add_eos_token added_tokens_decoder bos_token legacy pad_token "
    "clean_up_tokenization_spaces eos_token model_max_length padding_side sp_model_kwargs "
    "spaces_between_special_tokens tokenizer_class unk_token use_default_system_prompt",
    "Llama-3": "added_tokens_decoder bos_token chat_template clean_up_tokenization_spaces "
    "eos_token model_input_names model_max_length pad_token padding_side tokenizer_class",
    "Yi": "add_bos_token add_eos_token added_tokens_decoder bos_token chat_template legacy "
    "clean_up_tokenization_spaces eos_token model_max_length pad_token padding_side "
    "sp_model_kwargs spaces_between_special_tokens tokenizer_class unk_token "
    "use_default_system_prompt additional_special_tokens use_fast trust_remote_code",
    "Qwen2": "add_bos_token add_prefix_space added_tokens_decoder additional_special_tokens "
    "bos_token chat_template clean_up_tokenization_spaces eos_token errors legacy "
    "model_max_length pad_token padding_side split_special_tokens tokenizer_class unk_token",
}


@pytest.mark.parametrize("kind", RELEASED_TOKENIZERS)
def test_every_key_of_a_released_tokenizer_has_a_class(kind: str) -> None:
    assert set(RELEASED_TOKENIZERS[kind].split()) <= known(TOKENIZER)


@pytest.mark.parametrize(
    ("classes", "file"),
    [
        ((LlamaConfig, Qwen2Config), LLM),
        ((SiglipVisionConfig, CLIPVisionConfig), TOWER),
    ],
)
def test_every_key_of_the_classes_of_transformers_has_a_class(
    classes: tuple[type, ...], file: str
) -> None:
    for cls in classes:
        own = cls().to_dict().keys() | inspect.signature(cls.__init__).parameters.keys()
        assert {name for name in own if name not in ("self", "kwargs")} <= known(file), cls


def test_every_key_of_generation_configs_has_a_class() -> None:
    assert GenerationConfig().to_dict().keys() <= known(GENERATION)


# The parameters of LlavaConfig in NVlabs/VILA's llava/model/configuration_llava.py.
LLAVA_CONFIG = (
    "llm_cfg vision_tower_cfg mm_projector_cfg architectures resume_path hidden_size "
    "mm_hidden_size image_aspect_ratio num_video_frames fps mm_vision_select_layer "
    "mm_vision_select_feature mm_use_im_start_end mm_use_im_patch_token mm_projector_lr "
    "vision_tower_lr vision_resolution interpolate_mode s2 dynamic_s2 s2_scales "
    "s2_max_split_size s2_resize_output_to_scale_idx min_tiles max_tiles video_max_tiles ps3 "
    "look_close_mode num_look_close num_token_look_close top_down_prompt_head_type "
    "high_res_pos_embed ps3_dynamic_aspect_ratio mm_low_res_token_num mm_scale_num "
    "num_time_tokens time_token_format image_encoder video_encoder"
)


def test_every_parameter_of_the_original_root_config_has_a_class() -> None:
    assert set(LLAVA_CONFIG.split()) <= known(ROOT)


def read_keys(module: str) -> Iterator[str]:
    """The keys that a module of vila_deploy/checkpoint reads through Fields."""
    tree = ast.parse((REPOSITORY / "vila_deploy" / "checkpoint" / module).read_text("utf-8"))
    readers = {"integer", "number", "boolean", "text", "choice", "child", "integers", "numbers"}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in readers
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def test_keys_without_effect_are_not_read() -> None:
    """A key that a reader asks for has a row that says so."""
    effective = {key.name for key in KEYS if key.kind != NO_EFFECT}
    ours = {"prompt_template", "mm_projector_token_order"}  # keys of this project
    inner = {"height", "width", "shortest_edge", "rope_type", "type", "factor", "_target_",
             "partial_rotary_factor"}  # fmt: skip
    manifest = {"num_frames", "time_tokens", "time_token"}  # VideoConfig.from_fields
    for module in ("config.py", "llm_config.py", "vision_config.py", "video_config.py"):
        assert set(read_keys(module)) <= effective | ours | inner | manifest, module


def test_the_page_names_every_key_without_effect() -> None:
    page = (REPOSITORY / "docs" / "config-keys.md").read_text("utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    assert {key.name for key in KEYS} <= named


def test_sources_are_named() -> None:
    for key in KEYS:
        assert key.source.startswith(("vila ", "vila1.5 ", "transformers ")), key
        assert key.source.endswith(".py"), key
    assert config_keys.KEYS
