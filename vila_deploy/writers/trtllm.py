"""TensorRT-LLM's checkpoint of the LLM: float16 or W4A16_AWQ, Llama or Qwen2, any GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.trtllm_reader import FOLDER
from vila_deploy.checkpoint.trtllm_sharding import check_llm
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.trtllm import asymmetric
from vila_deploy.utils.files import canonical_json
from vila_deploy.writers.folder import copy_parts, quantized_config, write_checksums
from vila_deploy.writers.trtllm_ranks import CheckpointWriter

if TYPE_CHECKING:
    from vila_deploy.formats.scheme import QuantScheme


def check(config: VilaConfig, scheme: QuantScheme) -> None:
    """Raises VilaDeployError for zero points, and for sizes that its kernels don't take."""
    if not scheme.symmetric:
        raise asymmetric()
    check_llm(config.llm, scheme.group_size)


class Writer:
    """Three folders, and in trtllm/ what `trtllm-build --checkpoint_dir` takes, for one GPU."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, scheme: QuantScheme):
        self._checkpoint, self._folder, self._scheme = checkpoint, folder, scheme
        copy_parts(checkpoint, folder)
        (folder / FOLDER).mkdir()
        llm = checkpoint.config.llm
        self._writer = CheckpointWriter(llm, folder / FOLDER, scheme.group_size)

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        if isinstance(value, QuantizedLinear):
            self._writer.add_linear(name, value)
        else:
            self._writer.add_tensor(name, value)

    def finish(self) -> None:
        with self._writer:
            self._writer.finish()
        quantization = {
            "quant_method": "trtllm",
            "bits": self._scheme.bits,
            "group_size": self._scheme.group_size,
            "zero_point": False,
        }
        config = quantized_config(self._checkpoint, quantization)
        (self._folder / "llm" / "config.json").write_text(canonical_json(config), "utf-8")
        write_checksums(self._folder)
