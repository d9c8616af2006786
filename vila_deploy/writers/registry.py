"""The on-disk formats of a quantized checkpoint, a row each; reading this table needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from vila_deploy.checkpoint import Checkpoint
    from vila_deploy.checkpoint.config import VilaConfig
    from vila_deploy.formats.base import QuantizedLinear
    from vila_deploy.formats.scheme import QuantScheme

# Tensors of a format that has shards wait in memory until one is full.
SHARD_BYTES = 512 << 20


class Writer(Protocol):
    """Writes one quantized checkpoint into a folder, tensor by tensor, as the layers come."""

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        """Takes what llm/ holds under `name`, in a plain checkpoint's order and spelling.

        Args:
            name: of a tensor with its `.weight`, or of a quantized linear without.
            value: a tensor in float16, or a linear.
        """

    def finish(self) -> None:
        """Writes the rest: configs, the other parts, checksums."""


@dataclass(frozen=True)
class Format:
    """A row of FORMATS.

    `module` has `check(config, scheme)`, which raises before any work what the format can't hold,
    and `Writer(checkpoint, folder, scheme)` for an empty folder; it may have `warning(scheme)`.
    `title` is what people call it.
    """

    title: str
    module: str

    def check(self, config: VilaConfig, scheme: QuantScheme) -> None:
        """Raises VilaDeployError if a model of this config does not fit the format."""
        import_module(self.module).check(config, scheme)

    def warning(self, scheme: QuantScheme) -> str | None:
        """What the format's own reader can't do with a model quantized by `scheme`, in a line."""
        found = getattr(import_module(self.module), "warning", None)
        line: str | None = found(scheme) if found else None
        return line

    def writer(self, checkpoint: Checkpoint, folder: Path, scheme: QuantScheme) -> Writer:
        """What writes `checkpoint`, quantized by `scheme`, into the empty `folder`."""
        writer: Writer = import_module(self.module).Writer(checkpoint, folder, scheme)
        return writer


FORMATS = {
    "awq": Format("AutoAWQ GEMM", "vila_deploy.writers.awq"),
    "tinychat": Format("TinyChat v2", "vila_deploy.writers.tinychat"),
    "trtllm": Format("TensorRT-LLM W4A16_AWQ", "vila_deploy.writers.trtllm"),
    "compressed-tensors": Format("compressed-tensors", "vila_deploy.writers.compressed_tensors"),
    "sglang": Format("AWQ GEMM in SGLang's one folder", "vila_deploy.writers.sglang"),
}
