"""Three folders whose llm/ is the one file that llm-awq writes for TinyChat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.folder_layout import llm_config_values
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD, layer_prefix
from vila_deploy.checkpoint.tinychat_file import SUFFIX
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.tinychat import check_sizes, pack
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json
from vila_deploy.writers.folder import copy_parts, packed, write_checksums
from vila_deploy.writers.torch_save import TorchFile

if TYPE_CHECKING:
    from vila_deploy.formats.scheme import QuantScheme

KERNEL_GROUP_SIZE = 128
# Of the model's name in the file's.
MODEL_CHARACTERS = 64


def check(config: VilaConfig, scheme: QuantScheme) -> None:
    """Refuses group sizes and layers that TinyChat's tiles don't hold.

    Raises:
        VilaDeployError: names the first linear that doesn't fit.
    """
    for name, (out_features, in_features) in config.llm.linears.items():
        try:
            check_sizes(out_features, in_features, scheme.group_size)
        except VilaDeployError as error:
            where = f"{layer_prefix(0)}.{name}"
            raise VilaDeployError(error.what, where=where, fix=error.fix) from error


def warning(scheme: QuantScheme) -> str | None:
    """Of what TinyChat can't do with the files."""
    if scheme.group_size == KERNEL_GROUP_SIZE:
        return None
    return (
        f"TinyChat's kernels compute groups of {KERNEL_GROUP_SIZE} only: it lays out groups of "
        f"{scheme.group_size} like this, but can't run them"
    )


def file_name(model: str, group_size: int) -> str:
    """Of the file in llm/, whose name tells the group size; nothing else in it may seem to."""
    plain = re.sub(r"-(?=g\d)|[^\w.+-]", "_", model, flags=re.ASCII)[:MODEL_CHARACTERS] or "model"
    return f"{plain}-w4-g{group_size}-awq{SUFFIX}"


class Writer:
    """One file of torch.save in llm/, as llm-awq's --dump_quant writes it."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, scheme: QuantScheme):
        self._checkpoint, self._folder = checkpoint, folder
        copy_parts(checkpoint, folder)
        name = file_name(checkpoint.root.resolve().name, scheme.group_size)
        self._file = TorchFile(folder / "llm" / name)

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        for full, tensor in packed(name, value, pack).items():
            self._file.add(full, tensor)
            # TinyChat unties the two and takes the head from the file alone.
            if full == EMBEDDING and self._checkpoint.config.llm.tie_word_embeddings:
                self._file.add(HEAD, tensor)

    def finish(self) -> None:
        self._file.finish()
        values = llm_config_values(self._checkpoint.layout)
        (self._folder / "llm" / "config.json").write_text(canonical_json(values), "utf-8")
        write_checksums(self._folder)
