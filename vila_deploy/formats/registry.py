"""The on-disk formats of a quantized checkpoint, a row each; reading this table needs no torch.

A format is one file in this room, with its Packing, and one row here. Only a format whose
checkpoint is more than the VILA layout with packed linears in llm/ names a writer or a reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vila_deploy.formats.base import Packing, QuantizationConfig
from vila_deploy.utils.fields import Fields

SHARDED_WRITER = "vila_deploy.writers.folder:ShardedWriter"


@dataclass(frozen=True)
class Format:
    """A row of FORMATS; the fields after the title are objects, as "module:name".

    Args:
        title: what people call it.
        packing_path: the Packing of its linears.
        writer_path: the Writer of such a checkpoint.
        reader_path: `(layout, llm_config) → reader` of llm/; empty for tensors in safetensors.
        recogniser_path: `(llm/config.json) → QuantizationConfig | None`, of a checkpoint whose
            config says nothing of a quantization; empty where it does.
    """

    title: str
    packing_path: str
    writer_path: str = SHARDED_WRITER
    reader_path: str = ""
    recogniser_path: str = ""

    @property
    def packing(self) -> Packing:
        packing: Packing = _load(self.packing_path)
        return packing

    @property
    def writer(self) -> Any:
        """Its Writer class; a type of a room above this one."""
        return _load(self.writer_path)

    @property
    def reader(self) -> Callable[..., Any] | None:
        return _load(self.reader_path) if self.reader_path else None

    def recognise(self, fields: Fields) -> QuantizationConfig | None:
        """Return the quantization of an llm/ whose config is silent, if it is of this format."""
        if not self.recogniser_path:
            return None
        quantization: QuantizationConfig | None = _load(self.recogniser_path)(fields)
        return quantization


FORMATS = {
    "awq": Format("AutoAWQ GEMM", "vila_deploy.formats.awq:AWQ_GEMM"),
    "tinychat": Format(
        "TinyChat v2",
        "vila_deploy.formats.tinychat:TINYCHAT_V2",
        writer_path="vila_deploy.writers.tinychat:TinychatWriter",
        reader_path="vila_deploy.checkpoint.tinychat_file:open_llm",
        recogniser_path="vila_deploy.checkpoint.tinychat_file:recognise",
    ),
    "trtllm": Format(
        "TensorRT-LLM W4A16_AWQ",
        "vila_deploy.formats.trtllm:W4A16_AWQ",
        writer_path="vila_deploy.writers.trtllm:TrtllmWriter",
        reader_path="vila_deploy.checkpoint.trtllm_reader:open_llm",
    ),
    "compressed-tensors": Format(
        "compressed-tensors", "vila_deploy.formats.compressed_tensors:PACK_QUANTIZED"
    ),
    "sglang": Format(
        "AWQ GEMM in SGLang's one folder",
        "vila_deploy.formats.awq:AWQ_GEMM",
        writer_path="vila_deploy.writers.sglang:SglangWriter",
    ),
    "gguf": Format(
        "GGUF",
        "vila_deploy.formats.gguf:GGUF_BLOCKS",
        writer_path="vila_deploy.writers.gguf:GgufWriter",
        reader_path="vila_deploy.checkpoint.gguf_reader:open_llm",
    ),
    "gguf-q8_0": Format(
        "GGUF with embedding and head in Q8_0",
        "vila_deploy.formats.gguf:GGUF_BLOCKS",
        writer_path="vila_deploy.writers.gguf:GgufQ8Writer",
        reader_path="vila_deploy.checkpoint.gguf_reader:open_llm",
    ),
    "gguf-q6_k": Format(
        "GGUF with embedding and head in Q6_K",
        "vila_deploy.formats.gguf:GGUF_BLOCKS",
        writer_path="vila_deploy.writers.gguf:GgufQ6Writer",
        reader_path="vila_deploy.checkpoint.gguf_reader:open_llm",
    ),
}


def format_of(quantization: QuantizationConfig) -> Format:
    """Return the row whose packing a checkpoint with this config has; the first of several."""
    return next(row for row in FORMATS.values() if row.packing.version == quantization.version)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
