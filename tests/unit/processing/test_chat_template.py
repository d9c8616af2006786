"""Prompt templates against the original code's: texts and token ids of 30 conversations each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import GOLDEN
from tests.support.prompt_cases import conversations, write_tokenizer
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.checkpoint.variants import GENERATIONS, LLM_FAMILIES
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.chat_template import (
    PROMPT_TEMPLATES,
    choose_template,
    render,
    render_answered,
    stop_token_ids,
    with_markers,
)
from vila_deploy.processing.multimodal_prompt import text_chunks
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer

GOLDEN = json.loads((GOLDEN / "prompts.json").read_text("utf-8"))["prompts"]
IMAGE = -200
STOPS = {
    "vicuna_v1": {"</s>"},
    "llama_3": {"<|eot_id|>", "<|end_of_text|>"},
    "llama_3_original": {"<|eot_id|>", "<|end_of_text|>"},
    "hermes-2": {"<|im_end|>"},
    "qwen2": {"<|im_end|>", "<|endoftext|>"},
}


def opened(folder: Path, template: str) -> Tokenizer:
    write_tokenizer(folder, template)
    return load_tokenizer(folder)


def digest(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def family_of(template: str) -> str:
    return "Qwen2ForCausalLM" if template == "qwen2" else "LlamaForCausalLM"


# Row of the golden file → (template, tokenizer, generation).
PROMPTS = {
    **{name: (name, name, LLM_FAMILIES[family_of(name)].generation) for name in PROMPT_TEMPLATES},
    "llama_3, no BOS": ("llama_3", "llama_3, no BOS", "vila1.5"),
    "llama_3_original, no BOS": ("llama_3_original", "llama_3, no BOS", "vila1.5"),
    "nvila: vicuna_v1": ("vicuna_v1", "vicuna_v1", "nvila"),
    "nvila: llama_3": ("llama_3", "llama_3", "nvila"),
    "nvila: llama_3, no BOS": ("llama_3", "llama_3, no BOS", "nvila"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_equal_the_original(name: str, tmp_path: Path) -> None:
    """Golden numbers: see "recipe" in the file."""
    template, kind, generation = PROMPTS[name]
    tokenizer, recipe = opened(tmp_path, kind), GENERATIONS[generation]
    end = recipe.image_end
    rows = []
    for turns in conversations():
        asked = [(with_markers(q, images, end), a) for images, q, a in turns]
        row = PROMPT_TEMPLATES[template]
        text = render(row, asked[:-1], asked[-1][0])
        first, *rest = text_chunks(tokenizer, text, recipe)
        ids = [*first, *(i for piece in rest for i in (IMAGE, *piece))]
        whole = digest(render_answered(row, *asked[0])) if len(asked) == 1 else None
        rows.append([digest(text), len(ids), digest(ids), whole])
    assert len(rows) == 30
    assert rows == GOLDEN[name]


def test_each_golden_row_is_compared() -> None:
    assert set(GOLDEN) == set(PROMPTS)


@pytest.mark.parametrize("kind", ["llama_3", "llama_3, no BOS"])
def test_text_behind_an_image_loses_its_first_token_where_only_the_template_writes_bos(
    kind: str, tmp_path: Path
) -> None:
    """As in training: Llama-3-VILA1.5-8B's tokenizer most likely puts no BOS before a text."""
    tokenizer = opened(tmp_path, kind)
    text = "<|begin_of_text|>the<image>\nthe<image>in the"
    bos = tokenizer.token_id("<|begin_of_text|>")
    first, *rest = text_chunks(tokenizer, text)
    whole = [tokenizer.encode(chunk) for chunk in ("\nthe", "in the")]
    assert first[0] == tokenizer.bos_id == bos
    assert (first.count(bos) == 2) == (kind == "llama_3")
    assert rest == (whole if kind == "llama_3" else [ids[1:] for ids in whole])
    # Without BOS in the text, and none put there, nothing is dropped.
    other = text.removeprefix("<|begin_of_text|>")
    assert text_chunks(tokenizer, other)[1:] == whole


@pytest.mark.parametrize("template", PROMPT_TEMPLATES)
def test_template_and_stops_come_from_family_and_tokenizer(template: str, tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, template)
    root = make_checkpoint(tmp_path / "c", qwen2=template == "qwen2")
    config = load_config(root)
    if template == "llama_3_original":
        assert choose_template(config, tokenizer) == "llama_3"
        config = dataclasses.replace(config, prompt_template=template)
    assert choose_template(config, tokenizer) == template
    found = {tokenizer.token_id(token) for token in STOPS[template]}
    assert None not in found
    assert stop_token_ids(PROMPT_TEMPLATES[template], tokenizer) == found
    # The tiny config's own end token is kept, as Llama-3's 128001 and NVILA's 151645 are.
    assert set(ModelInfo.from_config(config, tokenizer).stop_token_ids) == found | {2}


def test_root_config_overrides_the_choice(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", root_config={"prompt_template": "hermes-2"})
    model = ModelInfo.from_config(load_config(root), load_tokenizer(root / "llm"))
    assert model.prompt == "hermes-2"


@pytest.mark.parametrize(
    "text", ["Hello there", "a  b\nc é🎉", "", "\n What is it? 1234", "x<|im_end|>\ny", "I'm  "]
)
def test_vocab_and_merges_equal_transformers(tmp_path: Path, text: str) -> None:
    from transformers import Qwen2Tokenizer

    tokenizer = opened(tmp_path, "qwen2")
    library = Qwen2Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(text)
    assert ids == library(text).input_ids
    assert tokenizer.bos_ids == []
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)
