"""Three folders whose llm/ is packed and described as llm-compressor does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.formats.base import BITS
from vila_deploy.formats.compressed_tensors import pack
from vila_deploy.writers.folder import ShardedLlm

if TYPE_CHECKING:
    from vila_deploy.formats.scheme import QuantScheme


def quantization_config(group_size: int, symmetric: bool) -> dict[str, Any]:
    """The `quantization_config` that transformers, vLLM and SGLang look for."""
    weights = {
        "num_bits": BITS,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def check(config: VilaConfig, scheme: QuantScheme) -> None:
    """Raises nothing: whatever a scheme allows fits this format."""


class Writer(ShardedLlm):
    """Three folders, llm/ packed and described as llm-compressor does."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, scheme: QuantScheme):
        super().__init__(
            checkpoint,
            folder,
            lambda linear: pack(linear, scheme.symmetric),
            quantization_config(scheme.group_size, scheme.symmetric),
        )
