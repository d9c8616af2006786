"""Three folders whose llm/ is packed as AutoAWQ's GEMM layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.formats.awq import pack
from vila_deploy.writers.folder import ShardedLlm

if TYPE_CHECKING:
    from vila_deploy.formats.scheme import QuantScheme


def check(config: VilaConfig, scheme: QuantScheme) -> None:
    """Raises nothing: whatever a scheme allows fits this format."""


class Writer(ShardedLlm):
    """Three folders, llm/ with the `quantization_config` that AWQ loaders look for."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, scheme: QuantScheme):
        quantization = {
            "quant_method": "awq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            # vLLM's Marlin kernels take only this; zero points are stored either way.
            "zero_point": True,
            "symmetric": scheme.symmetric,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
        super().__init__(checkpoint, folder, pack, quantization)
