"""GGUF files that are written here, in llama.cpp itself: tokens, logits, rounding of tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.conversions import effective_weights
from tests.support.llamacpp import logits, opened, quantized_table, tokenize
from tests.support.paths import TINY_VILA
from tests.support.smollm2 import make_smollm2_vila
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.gguf_reader import gguf_files
from vila_deploy.formats.gguf_blocks import dequantize_table, quantize_table
from vila_deploy.formats.gguf_file import TENSOR_TYPES
from vila_deploy.processing.gguf_vocabulary import LLAMA_3_WORDS
from vila_deploy.processing.tokenizer import PROBES, QWEN2_WORDS, load_tokenizer
from vila_deploy.writers.convert import convert

SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, grouped queries": {"kv_heads": 2, "heads": 4},
    "Llama, linear rope": {"llm_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
    "Qwen2": {"qwen2": True, "kv_heads": 2},
    "Qwen2, tied": {"qwen2": True, "tied": True},
}
# Behind a special token llama.cpp puts a space in front, as transformers' legacy mode does.
PLAIN_PROBES = [probe for probe in PROBES if "<" not in probe]


def to_gguf(root: Path, out: Path) -> Path:
    convert(root, out, ["gguf"])
    (file,) = gguf_files(out / "llm")
    return file


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_smollm2_vila(tmp_path_factory.mktemp("smollm2") / "model")


def with_pattern(root: Path, pattern: str) -> Path:
    """tiny-vila with text split by `pattern`, as the tokenizers of Llama 3 and Qwen2 say it."""
    shutil.copytree(TINY_VILA, root)
    path = root / "llm" / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    split |= {"invert": False}
    level = {**values["pre_tokenizer"], "use_regex": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    path.write_text(json.dumps(values), "utf-8")
    return root


@pytest.mark.parametrize("pattern", [None, QWEN2_WORDS, LLAMA_3_WORDS])
def test_byte_level_tokens(pattern: str | None, tmp_path: Path) -> None:
    root = TINY_VILA if pattern is None else with_pattern(tmp_path / "tiny", pattern)
    assert_same_tokens(root, to_gguf(root, tmp_path / "gguf"), PROBES)


def test_tokens_of_smollm2(smollm2: Path, tmp_path: Path) -> None:
    assert_same_tokens(smollm2, to_gguf(smollm2, tmp_path / "gguf"), PROBES)


def test_tokens_of_a_vocabulary_with_byte_fallback(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "llama")
    assert_same_tokens(root, to_gguf(root, tmp_path / "gguf"), PLAIN_PROBES)


def assert_same_tokens(root: Path, file: Path, probes: Any) -> None:
    tokenizer = load_tokenizer(root / "llm")
    with opened(file, vocab_only=True) as model:
        for probe in probes:
            assert tokenize(model, probe) == tokenizer.encode(probe), probe


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_unquantized_weights(shape: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "fp", dtype=torch.float32, **SHAPES[shape])
    assert mean_kl(root, to_gguf(root, tmp_path / "gguf"), list(range(3, 120))) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_4_bit_weights(shape: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, **SHAPES[shape])
    # llama.cpp rounds activations to int8.
    assert mean_kl(root, to_gguf(root, tmp_path / "gguf"), list(range(3, 120))) < 2e-3


def test_logits_of_smollm2(smollm2: Path, tmp_path: Path) -> None:
    ids = load_tokenizer(smollm2 / "llm").encode((TINY_VILA.parent / "README.md").read_text())
    # Activations in float16.
    assert mean_kl(smollm2, to_gguf(smollm2, tmp_path / "gguf"), ids[:256]) < 1e-4


def mean_kl(root: Path, file: Path, ids: list[int]) -> float:
    """The divergence of llama.cpp's predictions from transformers' with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(root)
    config = AutoConfig.from_pretrained(root / "llm")
    config.quantization_config = None
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.load_state_dict(effective_weights(checkpoint))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    with opened(file) as model:
        found = torch.from_numpy(logits(model, ids)).double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("dtype", ["Q8_0", "Q6_K"])
def test_tables_are_rounded_as_ggml_does(dtype: str) -> None:
    table = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    table[7, 20:300] = 0
    kind = TENSOR_TYPES[dtype]
    theirs = quantized_table(table, kind.number, 512 // kind.block * kind.block_bytes)
    ours = torch.cat(list(quantize_table(table, dtype)))
    # The order in which sums are added decides between two roundings now and then.
    same = (theirs == ours).float().mean()
    assert float(same) > (0.999999 if dtype == "Q8_0" else 0.99)
    errors = [
        float((dequantize_table(content, dtype) - table).norm()) for content in (ours, theirs)
    ]
    assert errors[0] < 1.001 * errors[1]
