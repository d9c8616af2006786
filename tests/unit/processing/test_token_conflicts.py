"""Tokenizer files that contradict each other: one line, or what transformers makes of them."""

import json

import pytest

from tests.support.prompt_cases import write_tokenizer
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError


def change(folder, name, values, remove=()):
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: value for key, value in before.items() if key not in remove}
    path.write_text(json.dumps({**kept, **values}))


def decoder(**tokens):
    entries = {number.strip("_"): {"content": text} for number, text in tokens.items()}
    return {"added_tokens_decoder": entries}


CONFLICTS = {
    "an id of another piece": (
        "vicuna_v1", "added_tokens.json", {"[PAD]": 290}, r"'\[PAD\]' has id 290, that is '"
    ),
    "a piece with another id": (
        "vicuna_v1", "added_tokens.json", {"</s>": 368}, "'</s>' has id 368 in .*, here 2"
    ),
    "a gap": (
        "vicuna_v1", "added_tokens.json", {"[PAD]": 400}, r"'\[PAD\]' has id 400 in .*, here 368"
    ),
    "flags of a token": (
        "vicuna_v1", "tokenizer_config.json",
        {"added_tokens_decoder": {"368": {"content": "[PAD]", "lstrip": True}}},
        r"'\[PAD\]' has lstrip, rstrip or single_word",
    ),
    "an id that tokenizer.json doesn't leave": (
        "llama_3", "added_tokens.json", {"[PAD]": 9000}, r"'\[PAD\]' has id 9000 in .*, here 273"
    ),
    "an id of vocab.json": (
        "qwen2", "added_tokens.json", {"<|im_end|>": 3}, "has id 3 in the files beside it"
    ),
    "two ids": (
        "qwen2", "tokenizer_config.json", decoder(_100="<|im_end|>"),
        "decoder.'100': is token '<.im_end.>', added_tokens.json gives it 270",
    ),
    "a list that lacks some": (
        "qwen2", "tokenizer_config.json", decoder(_268="<|endoftext|>"),
        "lacks token '<.im_end.>', which added_tokens.json has",
    ),
    "another unknown token": (
        "vicuna_v1", "special_tokens_map.json", {"unk_token": "[UNK]"}, "unk_token is '.UNK.', tok"
    ),
    "another class": (
        "vicuna_v1", "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"},
        "unknown tokenizer class 'BertTokenizer'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_refused_in_one_line(tmp_path, name):
    template, file, values, expected = CONFLICTS[name]
    write_tokenizer(tmp_path, template)
    change(tmp_path, file, values)
    with pytest.raises(VilaDeployError, match=expected) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).isprintable()


def test_a_model_without_the_default_names_must_name_its_own(tmp_path):
    write_tokenizer(tmp_path, "hermes-2")
    change(tmp_path, "tokenizer_config.json", {}, remove=["eos_token"])
    with pytest.raises(VilaDeployError, match="eos_token is missing, and the model has no </s>"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", ["vicuna_v1", "hermes-2", "llama_3", "qwen2"])
def test_named_tokens_that_the_vocabulary_lacks_get_the_next_ids(tmp_path, template):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, template)
    change(tmp_path, "tokenizer_config.json", {"pad_token": "[PAD]", "sep_token": "[SEP]"})
    original = AutoTokenizer.from_pretrained(tmp_path, use_fast=False, legacy=False)
    text = "go[SEP]on[PAD] and[SEP]"
    ids = load_tokenizer(tmp_path).encode(text)
    assert ids == original(text, add_special_tokens=False).input_ids
    assert load_tokenizer(tmp_path).decode(ids) == original.decode(ids, skip_special_tokens=True)


def test_special_tokens_map_decides_where_both_name_a_token(tmp_path):
    write_tokenizer(tmp_path, "qwen2")
    tokenizer = load_tokenizer(tmp_path)
    end = [tokenizer.token_id("<|im_end|>")]
    assert tokenizer.decode(end) == ""
    change(tmp_path, "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    assert load_tokenizer(tmp_path).decode(end) == "<|im_end|>"
