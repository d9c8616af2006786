"""`--format trtllm` and `--to trtllm`: a checkpoint that vila-deploy and trtllm-build both take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.tiny import make_checkpoint
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.pipeline import quantize
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.convert import convert

SYMMETRIC = QuantScheme(64, symmetric=True)


@pytest.fixture(scope="module", params=["Llama", "Qwen2, tied"])
def made(request, tmp_path_factory):
    """The same quantization in both formats, out of one run."""
    folder = tmp_path_factory.mktemp("made")
    variant = {"qwen2": True, "tied": True} if request.param != "Llama" else {"kv_heads": 2}
    root = make_checkpoint(folder / "c", **variant)
    quantize(root, folder / "q", QuantizeOptions(SYMMETRIC, "rtn", formats=("awq", "trtllm")))
    return folder


def assert_same(first: Path, second: Path) -> None:
    one, two = open_checkpoint(first), open_checkpoint(second)
    for index in range(one.config.llm.num_layers):
        for name in one.config.llm.linears:
            left, right = (c.llm.linear(f"model.layers.{index}.{name}") for c in (one, two))
            for field in ("q", "scale", "zero"):
                assert torch.equal(getattr(left, field), getattr(right, field)), (name, field)
            assert (left.bias is None) == (right.bias is None)
            assert left.bias is None or torch.equal(left.bias, right.bias)
        norm = f"model.layers.{index}.post_attention_layernorm.weight"
        assert torch.equal(one.llm.tensor(norm), two.llm.tensor(norm))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(one.llm.tensor(name), two.llm.tensor(name))
    assert one.config.image == two.config.image


def test_quantizer_writes_it_and_it_opens(made):
    assert_same(made / "q" / "awq", made / "q" / "trtllm")
    folder = made / "q" / "trtllm" / "trtllm"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "rank0.safetensors"]
    assert json.loads((folder / "config.json").read_text())["quantization"]["group_size"] == 64
    assert not list((made / "q" / "trtllm" / "llm").glob("*.safetensors"))


def test_converts_there_and_back(made, tmp_path):
    convert(made / "q" / "awq", tmp_path / "t", ["trtllm"])
    convert(tmp_path / "t", tmp_path / "a", ["awq"])
    assert_same(made / "q" / "awq", tmp_path / "a")
    for name in ("rank0.safetensors", "config.json"):
        one, two = (f / "trtllm" / name for f in (tmp_path / "t", made / "q" / "trtllm"))
        assert one.read_bytes() == two.read_bytes()


def test_engines_are_built_from_it(made, tmp_path):
    root = made / "q" / "trtllm"
    options = BuildOptions("a100", "tensorrt-llm", max_seq_len=256, tp=2)
    if open_checkpoint(root).config.llm.family.name != "llama":
        with pytest.raises(VilaDeployError, match="never had engines for NVILA"):
            build_engine(root, tmp_path / "e", options)
        return
    # Halves of 128 input channels hold a group of 64 each.
    assert build_engine(root, tmp_path / "e", options).precision == "int4"
    assert len(list((tmp_path / "e" / "llm_checkpoint").glob("rank*"))) == 2


def test_refuses_zero_points_before_work(tmp_path):
    root = make_checkpoint(tmp_path / "q", quantized=True)
    with pytest.raises(VilaDeployError, match="has none; quantize with vila-quantize --symmetric"):
        convert(root, tmp_path / "t", ["trtllm"])
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_damage_is_named(made, tmp_path):
    convert(made / "q" / "awq", tmp_path / "t", ["trtllm"])
    (tmp_path / "t" / "trtllm" / "rank0.safetensors").unlink()
    with pytest.raises(VilaDeployError, match=r"rank0\.safetensors: "):
        open_checkpoint(tmp_path / "t")
