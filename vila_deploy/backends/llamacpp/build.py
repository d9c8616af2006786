"""Write an engine for llama.cpp: vision/ as ONNX graphs, the language model as a GGUF file."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from vila_deploy.backends.llamacpp import files
from vila_deploy.backends.llamacpp.memory import HEAD_TYPES, bytes_per_step, linear_type
from vila_deploy.backends.onnxruntime.build import write_chosen_vision
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.gguf_layout import hyperparameters, tensor_specs
from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NORMS,
    LlmConfig,
    layer_prefix,
)
from vila_deploy.checkpoint.weight_source import ModelWeights, WeightSource
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.formats.base import HEAD_LINEAR, QuantizedLinear, to_float16
from vila_deploy.formats.gguf import layer_types_of
from vila_deploy.formats.module_dtypes import FP16, INT4
from vila_deploy.utils.progress import Advance, progress
from vila_deploy.utils.version import __version__
from vila_deploy.writers.gguf_files import FILE_TYPES, GgufFiles, add_tensor


def build(
    folder: Path,
    config: VilaConfig,
    weights: ModelWeights,
    request: BuildRequest,
) -> BuildResult:
    """Write vision/ and llm/ into `folder`, with the memory of one decoder layer."""
    steps = config.vision_layers_used + 1 + config.llm.num_layers + 1
    with progress(steps, "building") as advance:
        chosen = write_chosen_vision(folder, config, weights, request, advance)
        (folder / files.LLM).mkdir()
        write_llm(folder / files.LLM, config, weights.llm, request, advance)
    versions = {name: version(name) for name in ("onnx", "onnxruntime")}
    kind, head = _linear_type(config.llm, request), request.module_precision.lm_head
    return BuildResult(bytes_per_step(config.llm, kind, head), versions, chosen=chosen)


def write_llm(
    folder: Path, config: VilaConfig, weights: WeightSource, request: BuildRequest, advance: Advance
) -> None:
    """Write the language model into `folder`, one decoder layer in memory at a time."""
    llm, head = config.llm, request.module_precision.lm_head
    kind = _linear_type(llm, request)
    heads = () if head == FP16 else (HEAD_TYPES[head],)
    types_of = layer_types_of(llm.quantization.scheme) if llm.quantization else {}
    specs = list(tensor_specs(llm, ("F16",), (kind,), heads, types_of))
    metadata = _metadata(llm, request.limits.max_seq_len, kind)
    with GgufFiles(folder, files.MODEL.removesuffix(".gguf"), metadata, specs) as file:
        for index in range(llm.num_layers):
            _add_layer(file, llm, weights, layer_prefix(index))
            advance(f"decoder layer {index}")
        add_tensor(file, llm, EMBEDDING, to_float16(weights.tensor(EMBEDDING), EMBEDDING))
        add_tensor(file, llm, FINAL_NORM, weights.tensor(FINAL_NORM))
        _add_head(file, llm, weights, head)
        file.finish()
        advance("lm_head")


def _linear_type(config: LlmConfig, request: BuildRequest) -> str:
    return linear_type(config, request.target, INT4 if config.quantization else FP16)


def _add_layer(file: GgufFiles, config: LlmConfig, weights: WeightSource, prefix: str) -> None:
    for norm in NORMS:
        name = f"{prefix}.{norm}.weight"
        add_tensor(file, config, name, weights.tensor(name))
    for linear in config.linears:
        name = f"{prefix}.{linear}"
        value = weights.linear(name)
        if isinstance(value, QuantizedLinear):
            add_tensor(file, config, name, value)
            continue
        add_tensor(file, config, f"{name}.weight", to_float16(value, name))
        if config.has_bias(linear):
            add_tensor(file, config, f"{name}.bias", weights.tensor(f"{name}.bias"))


def _add_head(file: GgufFiles, config: LlmConfig, weights: WeightSource, dtype: str) -> None:
    """Write the head, unless it is the embedding as that is stored."""
    quantized = weights.linear(HEAD_LINEAR) if config.head_is_quantized else None
    if dtype != FP16 and isinstance(quantized, QuantizedLinear):
        add_tensor(file, config, HEAD_LINEAR, quantized)
    elif config.tie_word_embeddings:
        if dtype != FP16:
            add_tensor(file, config, HEAD, to_float16(weights.tensor(EMBEDDING), EMBEDDING))
    else:
        table = weights.tensor(HEAD)
        add_tensor(file, config, HEAD, to_float16(table, HEAD) if dtype == FP16 else table)


def _metadata(config: LlmConfig, max_seq_len: int, kind: str) -> dict[str, Any]:
    """What llama.cpp computes with; the tokenizer stays ours, so that any is possible."""
    return {
        **hyperparameters(config),
        f"{config.family.name}.context_length": max_seq_len,
        "general.name": "model",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "general.quantized_by": f"vila-deploy {__version__}",
        "tokenizer.ggml.model": "no_vocab",
    }
