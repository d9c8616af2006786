"""Read what vLLM or SGLang needs to know of a checkpoint, and say early what it could not load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig, config_of
from vila_deploy.checkpoint.folder_layout import Layout, find_layout, llm_config_values
from vila_deploy.checkpoint.gguf_reader import gguf_files
from vila_deploy.checkpoint.reader import find_tensors
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.formats.registry import FORMATS, format_of
from vila_deploy.processing.own_template import follow_tokenizer
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

# Formats of llm/ that the loaders of both read.
READABLE = ("awq", "compressed-tensors", "sglang")


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint's configs and tokenizer; no weights."""

    layout: Layout
    config: VilaConfig
    info: ModelInfo
    tokenizer: Tokenizer

    @property
    def llm_values(self) -> dict[str, Any]:
        """Return llm/config.json as transformers reads it."""
        values = {"model_type": self.config.llm.family.name, **llm_config_values(self.layout)}
        return {key: value for key, value in values.items() if key != "auto_map"}

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Return the `quantization_config` of llm/config.json."""
        return self.layout.llm.values.get("quantization_config")

    @property
    def weight_pattern(self) -> str:
        """Return which files below the root hold the LLM's weights.

        Raises:
            VilaDeployError: there are none, a header is damaged, or they are pickles.
        """
        folder = self.layout.folder("llm")
        if gguf_files(folder):
            raise VilaDeployError(
                "holds the LLM as GGUF, which is read by vila-quantize and vila-convert only",
                where=folder,
                fix="vila-quantize it with --format awq",
            )
        find_tensors(folder)
        return "*.safetensors" if self.layout.flat else "llm/*.safetensors"


def read_served_model(root: Path, program: str = "vLLM") -> ServedModel:
    """Read and check a checkpoint's configs and tokenizer.

    Args:
        program: that loads the weights, for messages.

    Raises:
        VilaDeployError: what is wrong with it, or a format of weights that isn't read.
    """
    layout = find_layout(root)
    folder = layout.folder("llm")
    config = follow_tokenizer(config_of(layout), folder)
    if config.llm.quantization is not None:
        used = format_of(config.llm.quantization)
        if used not in [FORMATS[name] for name in READABLE]:
            raise VilaDeployError(
                f"is quantized as {used.title}, which {program} doesn't read for VILA",
                where=root,
                fix="vila-convert it --to awq, or quantize it with --format awq",
            )
        if config.llm.quantization.linear_bits:
            raise VilaDeployError(
                f"has linears of several numbers of bits, and {program} joins some to one",
                where=root,
                fix="quantize it without --bits-per-weight, or run it with --target cpu",
            )
    tokenizer = load_tokenizer(folder)
    return ServedModel(layout, config, ModelInfo.from_config(config, tokenizer), tokenizer)
