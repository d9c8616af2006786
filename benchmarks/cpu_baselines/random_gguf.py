"""A GGUF file of a released model's shapes with random weights, by this project's GGUF writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vila_deploy.checkpoint.gguf_layout import hyperparameters, tensor_specs
from vila_deploy.checkpoint.presets import preset
from vila_deploy.checkpoint.tensor_schema import llm_tensor_specs
from vila_deploy.formats.base import SYMMETRIC_ZERO, QuantizedLinear
from vila_deploy.formats.gguf import GGUF_BLOCKS
from vila_deploy.formats.gguf_blocks import quantize_table
from vila_deploy.model.random_weights import RandomWeights
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES
from vila_deploy.processing.gguf_vocabulary import vocabulary_metadata
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.writers.gguf import FILE_TYPES, GgufFiles

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "tiny-vila" / "checkpoint" / "llm"
# Types of embedding and head, and of linears.
TYPES = {"int4": ("Q6_K", "Q4_0"), "fp16": ("F16", "F16")}
CONTEXT_LENGTH = 4096


def write_random_gguf(folder: Path, model: str, precision: str) -> Path:
    """Write the language model of `model` into `folder` and return the file.

    int4: Q4_0 linears, embedding and head in Q6_K; fp16: F16. The vocabulary is tiny-vila's with
    nameless tokens behind it, since llama.cpp asks for one.
    """
    llm = preset(model, precision).llm
    table, linear = TYPES[precision]
    metadata = hyperparameters(llm)
    metadata |= {
        f"{llm.family.name}.context_length": CONTEXT_LENGTH,
        "general.name": model,
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[linear],
    }
    metadata |= vocabulary_metadata(
        TOKENIZER, load_tokenizer(TOKENIZER), PROMPT_TEMPLATES["vicuna_v1"], llm.vocab_size
    )
    weights = RandomWeights(llm_tensor_specs(llm), llm)
    specs = list(tensor_specs(llm, (table,), (linear,)))
    with GgufFiles(folder, model, metadata, specs) as files:
        for spec in specs:
            stored = files.type_of(spec.source)
            if stored == "Q4_0":
                packed = _symmetric(weights.linear(spec.source.removesuffix(".weight")))
                files.write(spec.source, [packed.flatten(1)])
            elif stored == "Q6_K":
                files.write(spec.source, quantize_table(weights.tensor(spec.source), stored))
            else:
                kind = torch.float32 if stored == "F32" else torch.float16
                files.write(spec.source, [weights.tensor(spec.source).to(kind)])
        files.finish()
    return folder / files.names[0]


def _symmetric(linear: torch.Tensor | QuantizedLinear) -> torch.Tensor:
    """Return the blocks of a linear with its zero points at 8, as Q4_0 has them."""
    assert isinstance(linear, QuantizedLinear)
    symmetric = replace(linear, zero=torch.full_like(linear.zero, SYMMETRIC_ZERO), bias=None)
    return GGUF_BLOCKS.pack(symmetric, zero_point=False)["blocks"]
