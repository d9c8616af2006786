"""Write a quantized checkpoint whose llm/ is the one file that llm-awq writes for TinyChat."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.checkpoint.folder_layout import llm_config_values
from vila_deploy.checkpoint.hub import checkpoint_name
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.registry import Format
from vila_deploy.formats.tinychat import SUFFIX
from vila_deploy.utils.files import canonical_json
from vila_deploy.writers.folder import Writer, copy_parts, file_stem, packed
from vila_deploy.writers.torch_save import TorchFile


def file_name(model: str, group_size: int) -> str:
    """Return the name of the file in llm/, which tells the group size; nothing else may seem to."""
    plain = re.sub(r"-(?=g\d)", "_", file_stem(model), flags=re.ASCII)
    return f"{plain}-w4-g{group_size}-awq{SUFFIX}"


class TinychatWriter(Writer):
    """VILA layout with one file of torch.save in llm/, as llm-awq's --dump_quant writes it."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, row: Format, scheme: QuantScheme):
        super().__init__(checkpoint, folder, row, scheme)
        copy_parts(checkpoint, folder)
        name = file_name(checkpoint_name(checkpoint.root), scheme.group_size)
        self._file = TorchFile(folder / "llm" / name)

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        for full, tensor in packed(name, value, self._packing).items():
            self._file.add(full, tensor)
            # TinyChat unties the two and takes the head from the file alone.
            if full == EMBEDDING and self._checkpoint.config.llm.tie_word_embeddings:
                self._file.add(HEAD, tensor)

    def finish(self) -> None:
        self._file.finish()
        values = llm_config_values(self._checkpoint.layout)
        (self._folder / "llm" / "config.json").write_text(canonical_json(values), "utf-8")
        write_checksums(self._folder)
