"""Read what vLLM needs to know of a checkpoint, and say early what it could not load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig, config_of
from vila_deploy.checkpoint.folder_layout import Layout, find_layout, llm_config_values
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.formats.registry import FORMATS, format_of
from vila_deploy.processing.own_template import follow_tokenizer
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

# Formats of llm/ that vLLM's own loaders read.
READABLE = ("awq", "compressed-tensors", "sglang")
WEIGHT_SUFFIXES = (".safetensors", ".bin")


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
        """Return which files below the root hold the LLM's weights."""
        folder = self.layout.folder("llm")
        suffix = next((s for s in WEIGHT_SUFFIXES if any(folder.glob(f"*{s}"))), None)
        if suffix is None:
            raise VilaDeployError(
                f"holds no weights that vLLM reads ({' or '.join(WEIGHT_SUFFIXES)})",
                where=folder,
                fix="download the whole checkpoint, or quantize it with --format awq",
            )
        return f"*{suffix}" if self.layout.flat else f"llm/*{suffix}"


def read_served_model(root: Path) -> ServedModel:
    """Read and check a checkpoint's configs and tokenizer.

    Raises:
        VilaDeployError: what is wrong with it, or a format of weights that vLLM doesn't read.
    """
    layout = find_layout(root)
    folder = layout.folder("llm")
    config = follow_tokenizer(config_of(layout), folder)
    if config.llm.quantization is not None:
        used = format_of(config.llm.quantization)
        if used not in [FORMATS[name] for name in READABLE]:
            raise VilaDeployError(
                f"is quantized as {used.title}, which vLLM doesn't read for VILA",
                where=root,
                fix="vila-convert it --to awq, or quantize it with --format awq",
            )
    tokenizer = load_tokenizer(folder)
    return ServedModel(layout, config, ModelInfo.from_config(config, tokenizer), tokenizer)
