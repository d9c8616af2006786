"""GGUF of checkpoints of every family: exact, read back, and read by transformers and gguf-py."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from tests.support.conversions import VARIANTS, assert_same_llm, effective_weights
from tests.support.damage import is_refused
from tests.support.paths import TINY_VILA
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.checksums import CHECKSUM_FILE
from vila_deploy.checkpoint.config import load_config
from vila_deploy.checkpoint.gguf_reader import gguf_files
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.jinja_template import jinja_template, ollama_template
from vila_deploy.processing.own_template import recognize
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers import gguf_files as shards
from vila_deploy.writers.convert import convert

MUTATIONS = 300


def to_gguf(root: Path, out: Path, name: str = "gguf") -> Path:
    """Convert and return the only file."""
    convert(root, out, [name])
    (file,) = gguf_files(out / "llm")
    return file


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, **VARIANTS[variant])
    to_gguf(root, tmp_path / "gguf")
    assert_same_llm(root, tmp_path / "gguf")
    convert(tmp_path / "gguf", tmp_path / "awq", ["awq"])
    convert(root, tmp_path / "awq-too", ["awq"])
    sums = [(tmp_path / name / CHECKSUM_FILE).read_text("utf-8") for name in ("awq", "awq-too")]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("qwen2", [False, True])
def test_unquantized_weights_are_kept(dtype: torch.dtype, qwen2: bool, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "fp", dtype=dtype, qwen2=qwen2, kv_heads=2, shards=2)
    to_gguf(root, tmp_path / "gguf")
    one, two = open_checkpoint(root), open_checkpoint(tmp_path / "gguf")
    assert_same_tensors(one, two)
    with pytest.raises(VilaDeployError, match="is not quantized"):
        convert(root, tmp_path / "both", ["gguf", "awq"])


def assert_same_tensors(one: Checkpoint, two: Checkpoint) -> None:
    for name in one.llm.names():
        left, right = one.llm.tensor(name), two.llm.tensor(name)
        assert left.dtype == right.dtype
        assert torch.equal(left, right), name


@pytest.mark.parametrize("shape", [{}, {"qwen2": True, "kv_heads": 2}, {"kv_heads": 2}])
@pytest.mark.parametrize("quantized", [False, True])
def test_transformers_computes_the_same_from_it(
    shape: dict[str, Any], quantized: bool, tmp_path: Path
) -> None:
    """Its reader of GGUF has its own names, order of rows and dequantization."""
    from transformers import AutoModelForCausalLM

    root = make_checkpoint(tmp_path / "fp", quantized=quantized, **shape)
    file = to_gguf(root, tmp_path / "gguf")
    arguments = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **arguments)
    ours = AutoModelForCausalLM.from_config(theirs.config, **arguments)
    ours.load_state_dict(effective_weights(open_checkpoint(root)), strict=True)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found, expected = theirs(ids).logits, ours(ids).logits
    assert float((found - expected).abs().max()) < (2e-3 if quantized else 1e-4) * float(
        expected.abs().max()
    )


def test_every_tensor_dequantizes_to_the_effective_weights(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, qwen2=True)
    tensors = {t.name: t for t in GGUFReader(to_gguf(root, tmp_path / "gguf")).tensors}
    checkpoint = open_checkpoint(root)
    for index in range(checkpoint.config.llm.num_layers):
        for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q")):
            tensor = tensors[f"blk.{index}.{theirs}.weight"]
            found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            linear = checkpoint.llm.linear(f"model.layers.{index}.{ours}")
            assert isinstance(linear, QuantizedLinear)
            expected = linear.dequantize()
            assert tensor.tensor_type.name == "Q4_1"
            largest = float(linear.scale.float().abs().max())
            assert float((found - expected).abs().max()) <= 15 * largest * 2**-11


@pytest.mark.parametrize("name", ["gguf-q8_0", "gguf-q6_k"])
def test_tables_in_fewer_bits(name: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, hidden=256)
    plain, small = (to_gguf(root, tmp_path / each, each) for each in ("gguf", name))
    assert small.stat().st_size < plain.stat().st_size
    one, two = (open_checkpoint(file.parent.parent).llm for file in (plain, small))
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        left, right = one.tensor(table).float(), two.tensor(table).float()
        assert 0 < float((left - right).norm() / left.norm()) < 0.03
    assert torch.equal(one.tensor("model.norm.weight"), two.tensor("model.norm.weight"))
    narrow = make_checkpoint(tmp_path / "narrow", quantized=True)
    if name == "gguf-q6_k":
        with pytest.raises(VilaDeployError, match="Q6_K has blocks of 256"):
            convert(narrow, tmp_path / "none", [name])


def test_several_files_beyond_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True)
    monkeypatch.setattr(shards, "MAX_FILE_BYTES", 100_000)
    convert(root, tmp_path / "gguf", ["gguf"])
    files = gguf_files(tmp_path / "gguf" / "llm")
    assert len(files) > 2
    assert files[0].name == f"q-Q4_1-00001-of-{len(files):05d}.gguf"
    assert max(file.stat().st_size for file in files) < 130_000
    assert_same_llm(root, tmp_path / "gguf")
    second = GGUFReader(files[1])
    assert second.fields["split.no"].contents() == 1
    shutil.copy(files[1], tmp_path / "kept")
    files[1].unlink()
    with pytest.raises(VilaDeployError, match=r"00002-of-.*is missing"):
        open_checkpoint(tmp_path / "gguf")
    (tmp_path / "gguf" / CHECKSUM_FILE).unlink()
    shutil.copy(files[2], files[1])
    with pytest.raises(VilaDeployError, match="is file 2 of"):
        open_checkpoint(tmp_path / "gguf")


def test_metadata_says_what_it_is(tmp_path: Path) -> None:
    root = make_checkpoint(
        tmp_path / "q", quantized=True,
        llm_config={"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    )  # fmt: skip
    (root / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    fields = GGUFReader(to_gguf(root, tmp_path / "gguf")).fields
    config = load_config(root)
    expected = {
        "general.license": "cc-by-nc-4.0",
        "general.name": "q",
        "general.file_type": 3,
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.freq_base": 5e5,
        "llama.context_length": config.model_max_length,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"].contents()) == config.llm.vocab_size


def test_a_config_that_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True)
    to_gguf(root, tmp_path / "gguf")
    path = tmp_path / "gguf" / "llm" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))
    with pytest.raises(VilaDeployError, match="layer_norm_rms_epsilon: says"):
        open_checkpoint(tmp_path / "gguf")


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    root = shutil.copytree(TINY_VILA, tmp_path / "tiny")
    path = root / "llm" / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(values), "utf-8")
    with pytest.raises(VilaDeployError, match=r"llama\.cpp has no tokenizer with the pattern"):
        convert(root, tmp_path / "gguf", ["gguf"])
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("name", PROMPT_TEMPLATES)
def test_templates_write_the_same_conversation(name: str, tmp_path: Path) -> None:
    template = PROMPT_TEMPLATES[name]
    assert name in recognize(jinja_template(template), tmp_path)


@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("name", PROMPT_TEMPLATES)
def test_ollama_renders_what_we_render(name: str, trimmed: bool) -> None:
    """Turn by turn, the last up to where the answer is mentioned, as Ollama's template.go does."""
    template = PROMPT_TEMPLATES[name]
    written = ollama_template(template)
    answer = "A cat." if trimmed else f"{template.before_answer}A cat."
    first = {"System": "Be brief.", "Prompt": "What is it?", "Response": answer}
    last = {"System": "", "Prompt": "Sure?", "Response": ""}
    begun = written[: written.index("{{", written.index("{{ .Prompt }}") + 1)]
    expected = render(template, [("What is it?", "A cat.")], "Sure?", "Be brief.")
    assert rendered_by_go(written, first) + rendered_by_go(begun, last) == expected


def rendered_by_go(text: str, values: dict[str, str]) -> str:
    """The output of the few actions of Go's templates that a Modelfile of ours has."""
    out, shown = "", [True]
    for literal, action in re.findall(r"([^{]*)(?:\{\{ (.+?) \}\})?", text):
        out += literal if all(shown) else ""
        if condition := re.fullmatch(r"if \.(\w+)", action):
            shown.append(bool(values[condition[1]]))
        elif condition := re.fullmatch(r'if ne \(slice \.(\w+) 0 1\) "(.)"', action):
            shown.append(values[condition[1]][:1] != condition[2])
        elif action == "end":
            shown.pop()
        elif action:
            out += values[action.removeprefix(".")] if all(shown) else ""
    assert shown == [True]
    return out


def test_damaged_files_end_in_one_line(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, layers=1)
    file = to_gguf(root, tmp_path / "gguf")
    (tmp_path / "gguf" / CHECKSUM_FILE).unlink()
    good, rng, refused = file.read_bytes(), random.Random(1), 0
    header = len(good) // 4
    for number in range(MUTATIONS):
        content = bytearray(good)
        at = rng.randrange(header if number % 3 else len(content))
        if number % 5 == 0:
            del content[at:]
        elif number % 5 == 1:
            content[at:at] = rng.randbytes(rng.randint(1, 64))
        else:
            content[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])
        file.write_bytes(content)
        refused += is_refused(lambda: read_all(tmp_path / "gguf"))
    # The others change a quantized value, or a text of the vocabulary, which config.json lacks.
    assert refused > MUTATIONS * 0.6


def read_all(root: Path) -> None:
    checkpoint = open_checkpoint(root)
    for name in checkpoint.config.llm.layer_linears(0):
        checkpoint.llm.linear(name)
    checkpoint.llm.tensor("model.embed_tokens.weight")
    checkpoint.llm.tensor("lm_head.weight")
    checkpoint.llm.tensor("model.norm.weight")


def test_checksums_find_every_change(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "q", quantized=True, layers=1)
    file = to_gguf(root, tmp_path / "gguf")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(VilaDeployError, match="content has changed"):
        open_checkpoint(tmp_path / "gguf")


@pytest.mark.parametrize("model", ["new\nline", "x" * 250, "a b/../c".replace("/", "\\")])
def test_the_name_of_a_folder_makes_a_plain_file_name(model: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / model, quantized=True)
    file = to_gguf(root, tmp_path / "gguf")
    assert re.fullmatch(r"[\w.+-]{1,64}-Q4_1\.gguf", file.name, re.ASCII)
    assert f"FROM ./{file.name}\n" in (file.parent / "Modelfile").read_text("utf-8")
