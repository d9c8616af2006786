"""TensorRT-LLM's checkpoint: bit for bit there and back, and run from its files alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.support.trtllm_cases import llm_config
from tests.support.trtllm_reference import logits, unpacked
from vila_deploy.checkpoint.llm_config import NORMS, QKV, LlmConfig
from vila_deploy.checkpoint.trtllm_reader import TrtllmCheckpoint
from vila_deploy.checkpoint.trtllm_sharding import Parallel
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.trtllm import W4A16_AWQ
from vila_deploy.model.llm import LanguageModel
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.trtllm import write_trtllm

TOKENS = [3, 1002, 17, 500, 41, 41, 7]
PARALLEL = {"one": (1, 1), "tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2), "tp4pp2": (4, 2)}


class Weights:
    """A WeightSource of random weights, each the same whenever it is asked for."""

    def __init__(self, config: LlmConfig, zero: int | None = 8, prequant: bool = False):
        self.config, self.zero, self.prequant = config, zero, prequant

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(sum(name.encode()) + 1000 * len(name))

    def tensor(self, name: str) -> Tensor:
        generator, hidden = self.generator(name), self.config.hidden_size
        if name.endswith("norm.weight"):
            return (1 + 0.1 * torch.randn(hidden, generator=generator)).half()
        if name.endswith(".bias"):
            rows, _ = self.config.linears[name.split(".", 3)[3].removesuffix(".bias")]
            return torch.randn(rows, generator=generator).half()
        size = (self.config.vocab_size, hidden)
        return (torch.randn(size, generator=generator) / hidden**0.5).half()

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        name = prefix.split(".", 3)[3]
        rows, columns = self.config.linears[name]
        generator = self.generator(prefix)
        if self.config.quantization is None:
            return (torch.randn(rows, columns, generator=generator) / columns**0.5).half()
        groups = columns // self.config.quantization.group_size
        q = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
        scale = (0.1 + torch.rand(rows, groups, generator=generator)) / 3 / columns**0.5
        zero = torch.full((rows, groups), 8 if self.zero is None else self.zero, dtype=torch.uint8)
        bias = self.tensor(f"{prefix}.bias") if self.config.has_bias(name) else None
        prequant = None
        if self.prequant:  # one for q, k and v
            key = "qkv" if name in QKV else name
            prequant = 0.5 + torch.rand(columns, generator=self.generator(key)).half()
        return QuantizedLinear(q, scale.half(), zero, bias, prequant)


def write(folder: Path, config: LlmConfig, weights: Weights, tp: int = 1, pp: int = 1) -> Path:
    folder.mkdir()
    write_trtllm(config, weights, folder, Parallel(tp, pp))
    return folder


def assert_same(one: Tensor | QuantizedLinear, other: Tensor | QuantizedLinear) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        return
    assert isinstance(other, QuantizedLinear)
    for field in ("q", "scale", "zero", "bias", "prequant_scale"):
        left, right = getattr(one, field), getattr(other, field)
        assert (left is None) == (right is None), field
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), field


@pytest.mark.parametrize("ways", PARALLEL)
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("group_size", [None, 64])
def test_written_and_read_bit_for_bit(tmp_path, family, group_size, ways):
    config = llm_config(family, group_size)
    weights = Weights(config, prequant=family == "LlamaForCausalLM")
    folder = write(tmp_path / "c", config, weights, *PARALLEL[ways])
    tp, pp = PARALLEL[ways]
    assert len(list(folder.glob("rank*.safetensors"))) == tp * pp
    back = TrtllmCheckpoint(folder, config)
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    for index in range(config.num_layers):
        for name in config.linears:
            full = f"model.layers.{index}.{name}"
            assert_same(weights.linear(full), back.linear(full))
            names += [f"{full}.bias"] if config.has_bias(name) else []
        names += [f"model.layers.{index}.{norm}.weight" for norm in NORMS]
    for name in names:
        assert_same(weights.tensor(name), back.tensor(name))


@pytest.mark.parametrize("ways", PARALLEL)
@pytest.mark.parametrize(
    ("family", "group_size", "prequant"),
    [
        ("LlamaForCausalLM", 64, True),
        ("Qwen2ForCausalLM", 64, False),
        ("Qwen2ForCausalLM", None, False),
    ],
)
def test_computes_what_the_model_computes(tmp_path, family, group_size, prequant, ways):
    """The files, run the way that TensorRT-LLM's layers are written, against transformers."""
    config = llm_config(family, group_size)
    weights = Weights(config, prequant=prequant)
    folder = write(tmp_path / "c", config, weights, *PARALLEL[ways])
    found = logits(folder, TOKENS)
    model = LanguageModel(config, weights)
    expected = model(weights.tensor("model.embed_tokens.weight")[TOKENS].float()).double()
    error = (found[:, : config.vocab_size] - expected).norm() / expected.norm()
    assert error < 1e-5
    assert not found[:, config.vocab_size :].any()


def test_a_byte_by_hand():
    q = torch.full((4, 64), 8, dtype=torch.uint8)
    q[2, 5], q[3, 5] = 15, 1  # 7 and −7
    scale = torch.full((4, 1), 0.5).half()
    packed = W4A16_AWQ.pack(QuantizedLinear(q, scale, torch.full((4, 1), 8, dtype=torch.uint8)))
    assert packed["weight"].shape == (2, 64)
    assert packed["weight"].nonzero().tolist() == [[1, 5]]
    assert int(packed["weight"][1, 5]) % 256 == 0x97
    assert packed["prequant_scaling_factor"].eq(1).all()
    raw = {f"x.{name}": tensor.numpy() for name, tensor in packed.items()}
    weight, _ = unpacked(raw, "x")
    assert weight[2, 5] == 3.5
    assert weight[3, 5] == -3.5


def test_vocabulary_is_padded_for_awq_only(tmp_path):
    quantized, dense = llm_config(), llm_config(group_size=None)
    for config, tp, vocabulary, rows in (
        (quantized, 1, 1024, 1024),
        (quantized, 4, 1024, 256),
        (dense, 1, 1003, 1003),
        (dense, 4, 1003, 251),  # TensorRT-LLM pads the head by itself, to a share for each GPU
    ):
        folder = write(tmp_path / f"{tp}-{vocabulary}-{rows}", config, Weights(config), tp)
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocabulary
        with safe_open(folder / f"rank{tp - 1}.safetensors", "pt") as file:
            for name in ("lm_head.weight", "transformer.vocab_embedding.weight"):
                table = file.get_tensor(name)
                assert table.shape == (rows, 256)
                assert not table[1003 - rows * (tp - 1) :].any()


def test_linear_rope_is_written(tmp_path):
    """Under the key that TensorRT-LLM's attention reads, only where it is not 1."""
    config = llm_config(rope_factor=4.0)
    folder = write(tmp_path / "c", config, Weights(config), 1)
    values = json.loads((folder / "config.json").read_text())
    assert values["rotary_scaling"] == {"type": "linear", "factor": 4.0}
    plain = write(tmp_path / "p", llm_config(), Weights(llm_config()), 1)
    assert "rotary_scaling" not in json.loads((plain / "config.json").read_text())


def test_tied_head_is_written(tmp_path):
    config = llm_config("Qwen2ForCausalLM", tie_word_embeddings=True)
    weights = Weights(config)
    back = TrtllmCheckpoint(write(tmp_path / "c", config, weights, 2, 2), config)
    assert torch.equal(back.tensor("lm_head.weight"), weights.tensor("model.embed_tokens.weight"))


@pytest.mark.parametrize(
    ("changes", "ways", "message"),
    [
        ({}, (3, 1), r"3 GPUs can't share 4 attention heads evenly; choose a --tp that divides 4$"),
        ({"num_heads": 6, "num_kv_heads": 3}, (2, 1), "share 3 key/value heads; choose a --tp"),
        ({}, (1, 3), "3 GPUs can't share 2 layers evenly; choose a --pp that divides 2$"),
        ({"intermediate_size": 384}, (4, 1), "mlp.proj: 96 input channels on each of 4 GPUs"),
        ({"group_size": 32}, (1, 1), "takes groups of 64 or 128, found 32; quantize with --group"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, changes, ways, message):
    config = llm_config(**changes)
    with pytest.raises(VilaDeployError, match=message) as caught:
        write(tmp_path / "c", config, Weights(config), *ways)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "c").iterdir())


def test_refuses_zero_points(tmp_path):
    config = llm_config()
    with pytest.raises(VilaDeployError, match=r"q_proj: is quantized with zero.*--symmetric$"):
        write(tmp_path / "c", config, Weights(config, zero=7))
    with pytest.raises(VilaDeployError, match="W4A16_AWQ has none; quantize with vila-quantize"):
        W4A16_AWQ.pack(Weights(config, zero=9).linear("model.layers.0.mlp.up_proj"))


def test_refuses_qkv_with_scales_of_their_own(tmp_path):
    config = llm_config()

    class Apart(Weights):
        def linear(self, prefix):
            found = super().linear(prefix)
            if prefix.endswith("k_proj"):
                found = replace(found, prequant_scale=found.prequant_scale * 2)
            return found

    with pytest.raises(VilaDeployError, match="q, k and v differ in how they are quantized"):
        write(tmp_path / "c", config, Apart(config, prequant=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "rank1.safetensors").unlink(), "rank1.safetensors: is missing"),
        (lambda f: edit(f, "hidden_size", 128), "hidden_size: 128 is not the model's 256"),
        (lambda f: edit(f, "vocab_size", 1088), "vocab_size: does not fit the model's 1003"),
        (lambda f: edit(f, "dtype", "bfloat16"), "dtype: only float16 is supported"),
        (lambda f: edit(f, "quantization", {"quant_algo": "FP8"}), "'FP8' is not supported"),
        (lambda f: edit(f, "mapping", {"world_size": 2, "tp_size": 1}), r"must be tp_size × pp_"),
        (
            lambda f: (f / "rank0.safetensors").replace(f / "rank1.safetensors"),
            "rank0.safetensors: is missing",
        ),
        (
            lambda f: edit(f, "mapping", {"world_size": 2, "tp_size": 1, "pp_size": 2}),
            r"tensor transformer.vocab_embedding.weight is F16 \[512, 256\], must be F16 \[1024",
        ),
    ],
)
def test_refuses_other_checkpoints(tmp_path, damage, message):
    config = llm_config()
    folder = write(tmp_path / "c", config, Weights(config), 2)
    damage(folder)
    with pytest.raises(VilaDeployError, match=message):
        TrtllmCheckpoint(folder, config)


def edit(folder: Path, key: str, value: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
