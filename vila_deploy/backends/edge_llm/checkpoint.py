"""Write the LLM as TensorRT-Edge-LLM's exporter reads it: weights, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from vila_deploy.backends.edge_llm import files
from vila_deploy.backends.edge_llm.chat_template import jinja_of
from vila_deploy.backends.edge_llm.tokenizer import write_tokenizer
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NORMS,
    LlmConfig,
    layer_prefix,
)
from vila_deploy.checkpoint.variants import LLM_FAMILIES
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.awq import AWQ_GEMM
from vila_deploy.formats.base import QuantizedLinear, to_float16
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, choose_template
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.progress import Advance
from vila_deploy.writers.folder import ShardWriter, packed


def write_checkpoint(
    folder: Path, config: VilaConfig, llm: WeightSource, tokenizer: Path, advance: Advance
) -> None:
    """Write weights, config.json, tokenizer and chat template into the existing `folder`.

    Memory for one shard; quantized values and scales are those of `llm`, bit for bit.

    Raises:
        VilaDeployError: a linear that AutoAWQ's format can't hold, or a tokenizer that the runtime
            would read otherwise.
    """
    values = hf_config(config.llm)
    (folder / files.CONFIG).write_text(canonical_json(values), "utf-8")
    template = PROMPT_TEMPLATES[choose_template(config, load_tokenizer(tokenizer))]
    prefix = write_tokenizer(folder, tokenizer, template)
    (folder / files.CHAT_TEMPLATE).write_text(jinja_of(template, prefix), "utf-8")
    shards = ShardWriter(folder)
    for name in tensor_names(config.llm):
        shards.add(name, to_float16(llm.tensor(name), name))
    advance("embeddings")
    for index in range(config.llm.num_layers):
        prefix = layer_prefix(index)
        for norm in NORMS:
            name = f"{prefix}.{norm}.weight"
            shards.add(name, to_float16(llm.tensor(name), name))
        for linear in config.llm.linears:
            for name, tensor in _linear(llm, config.llm, f"{prefix}.{linear}", linear).items():
                shards.add(name, tensor)
        advance(f"decoder layer {index}")
    shards.finish()


def tensor_names(config: LlmConfig) -> tuple[str, ...]:
    """Return the tensors outside the decoder layers."""
    return EMBEDDING, FINAL_NORM, *(() if config.tie_word_embeddings else (HEAD,))


def _linear(llm: WeightSource, config: LlmConfig, full: str, name: str) -> dict[str, Tensor]:
    value = llm.linear(full)
    if isinstance(value, QuantizedLinear):
        return packed(full, value, AWQ_GEMM)
    tensors = {f"{full}.weight": to_float16(value, full)}
    if config.has_bias(name):
        tensors[f"{full}.bias"] = to_float16(llm.tensor(f"{full}.bias"), full)
    return tensors


def hf_config(config: LlmConfig) -> dict[str, Any]:
    """Return config.json as transformers writes it for this LLM."""
    architecture = next(key for key, row in LLM_FAMILIES.items() if row == config.family)
    values = {
        "architectures": [architecture],
        "model_type": config.family.name,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "dtype": "float16",
        "torch_dtype": "float16",
    }
    if config.quantization is not None:
        scheme = config.quantization.scheme
        values["quantization_config"] = AWQ_GEMM.quantization_config(scheme)
    return values
