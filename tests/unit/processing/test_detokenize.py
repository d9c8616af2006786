"""Text of token ids against transformers' decode(skip_special_tokens=True), of each kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.prompt_cases import QWEN2, write_tokenizer
from tests.support.tiny import make_checkpoint
from vila_deploy.processing.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

# (token, special): boxes, time stamps and tools that fine-tunes add, and one that is special.
ADDED = (("<box_1>", False), ("<t3.5>", False), ("<tool call>", False), ("<ende>", True))
KINDS = ("vicuna_v1", "hermes-2", "llama_3", "qwen2")


def token(content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": special, **flags}


def add_tokens(folder: Path, template: str) -> None:
    """Add ADDED as `tokenizer.add_tokens` and `save_pretrained` leave them for this kind."""
    first = load_tokenizer(folder).vocab_size
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    decoder = settings.setdefault("added_tokens_decoder", {})
    if template == "qwen2":
        decoder |= {str(first - 3 + i): token(name, True) for i, name in enumerate(QWEN2)}
    decoder |= {str(first + i): token(*entry) for i, entry in enumerate(ADDED)}
    config.write_text(json.dumps(settings))
    names = {entry["content"]: int(number) for number, entry in decoder.items()}
    if template == "llama_3":
        library = json.loads((folder / "tokenizer.json").read_text())
        library["added_tokens"] += [{"id": first + i, **token(*e)} for i, e in enumerate(ADDED)]
        (folder / "tokenizer.json").write_text(json.dumps(library))
    else:
        (folder / "added_tokens.json").write_text(json.dumps(names))


def assert_decodes_as_transformers(folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder, legacy=False)
    rng = random.Random(seed)
    added = [oracle.convert_tokens_to_ids(content) for content, _ in ADDED]
    # Ids beyond the vocabulary too: an embedding may have more rows than the tokenizer tokens.
    last = tokenizer.vocab_size + 8
    for length in [0, 1, 1, *range(2, 40)]:
        ids = [rng.choice(added) if rng.random() < 0.3 else rng.randrange(last)
               for _ in range(length)]  # fmt: skip
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("template", KINDS)
def test_random_ids_decode_as_in_transformers(template: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template)
    add_tokens(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path)
    for seed in range(5):
        assert_decodes_as_transformers(tmp_path, tokenizer, seed)


@pytest.mark.parametrize("template", KINDS)
def test_added_tokens_stay_in_answers_and_special_ones_do_not(
    template: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, template)
    add_tokens(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("the<box_1>in<ende> a<t3.5>")
    assert tokenizer.token_id("<box_1>") in ids
    assert tokenizer.decode(ids) == "the<box_1>in a<t3.5>"
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)


def test_settings_add_and_mark_tokens_of_a_tokenizer_json(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama_3")
    first = load_tokenizer(tmp_path).vocab_size
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    # One that the file lacks, one whose flag the file has otherwise, one that is a plain piece.
    decoder = {str(first): token("<box_1>", False), "0": token("!", True)}
    settings |= {"added_tokens_decoder": decoder, "pad_token": "the"}
    file.write_text(json.dumps(settings))
    from transformers import AutoTokenizer

    tokenizer, oracle = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the<box_1>!", "in ! the", "<|eot_id|><box_1> a"):
        ids = oracle(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_old_added_tokens_are_special_only_where_the_map_names_them(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "vicuna_v1")
    first = load_tokenizer(tmp_path).vocab_size
    names = {"<box_1>": first, "<pad>": first + 1, "<sep>": first + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    special = {"pad_token": {"content": "<pad>"}, "sep_token": "<sep>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the<box_1><pad>in<sep>")) == "the<box_1>in"


@pytest.mark.parametrize("text", ["a é🎉b", "\ufffdx", "日本<0x0A>", " a  b"])
def test_bytes_decode_and_stream_alike(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_checkpoint(tmp_path / "c") / "llm")
    ids = tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"eos_token": 7}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<a>", 3]}),
        ("special_tokens_map.json", {"bos_token": {"content": []}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "a", "special": 1}}}),
        ("added_tokens.json", {"<a>": "x"}),
    ],
)
def test_wrong_token_settings_give_one_line(file: str, values: object, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "vicuna_v1")
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(VilaDeployError, match=file) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# What transformers' clean_up_tokenization changes, where it runs.
SPACED = ("a cat . a dog", "do n't ! I 'm", "it 's , they 've", "we 're ? ' a '", "  ..  ' s .")


def set_keys(folder: Path, **keys: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **keys}), "utf-8")


@pytest.mark.parametrize("template", KINDS)
def test_spaces_before_signs_stay_as_in_transformers(template: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, template)
    set_keys(tmp_path, clean_up_tokenization_spaces=True)
    tokenizer = load_tokenizer(tmp_path)
    oracle = AutoTokenizer.from_pretrained(tmp_path, legacy=False)
    assert oracle.clean_up_tokenization_spaces
    for text in SPACED:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert oracle.clean_up_tokenization(text) != text


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel", "WordPiece"])
def test_kinds_whose_text_transformers_cleans_up_are_refused(kind: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    vocabulary = {"<unk>": 0, "a": 1, ".": 2}
    model = {
        "Unigram": lambda: models.Unigram([(token, -1.0) for token in vocabulary], 0, False),
        "WordLevel": lambda: models.WordLevel(vocabulary, unk_token="<unk>"),
        "WordPiece": lambda: models.WordPiece(vocabulary, unk_token="<unk>"),
    }[kind]()
    Library(model).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == len(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    with pytest.raises(VilaDeployError, match=f"clean_up_tokenization_spaces: .*{kind}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
