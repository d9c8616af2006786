"""Read llm/ of the AWQ releases of VILA: one TinyChat `*-v2.pt` in place of the shards.

llm-awq ends the name of every quantized model that it writes in -v2.pt. Nothing in the file says
what it is: bits are always 4, and the group size stands in its name or follows from its shapes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from vila_deploy.checkpoint.folder_layout import Layout
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.reader import TensorReader, find_tensors, llm_reader
from vila_deploy.checkpoint.safetensors_header import TensorInfo
from vila_deploy.checkpoint.torch_load import PickledFile
from vila_deploy.formats.base import BITS, QuantizationConfig
from vila_deploy.formats.tinychat import GROUP_SIZES, SUFFIX, TINYCHAT_V2, group_size_of
from vila_deploy.utils.errors import VilaDeployError, printable, short
from vila_deploy.utils.fields import Fields

# Key of llm/config.json, ours.
WEIGHTS_FILE = "weights_file"
GROUP_IN_NAME = re.compile(r"-g(\d{1,6})(?=[-.])")


def recognise(fields: Fields) -> QuantizationConfig | None:
    """Return the quantization of the `*-v2.pt` that holds the weights; None where none does.

    Args:
        fields: llm/config.json.

    Raises:
        VilaDeployError: several such files, or one whose group size can't be told.
    """
    file = tinychat_file(fields)
    if file is None:
        return None
    return QuantizationConfig("awq", BITS, group_size(file), True, TINYCHAT_V2.version)


def open_llm(layout: Layout, config: LlmConfig) -> TensorReader:
    """Open the linears of llm/, checked against `config`."""
    folder, quantization = layout.folder("llm"), config.quantization
    assert quantization is not None
    file = tinychat_file(layout.llm)
    tensors = read_tinychat(file, quantization.group_size) if file else find_tensors(folder)
    return llm_reader(tensors, config, folder)


def tinychat_file(fields: Fields) -> Path | None:
    """Return the *-v2.pt that holds the weights of llm/; None where none does.

    The one that WEIGHTS_FILE names; else the only one there is, where there is no safetensors file,
    not even one of an incomplete set.

    Args:
        fields: llm/config.json.

    Raises:
        VilaDeployError: several such files, or none of that name.
    """
    folder = fields.source.parent
    names = _names(folder)
    files = [name for name in names if name.endswith(SUFFIX)]
    if WEIGHTS_FILE in fields:
        return folder / fields.choice(WEIGHTS_FILE, files, what=f"*{SUFFIX} in {folder}")
    if not files or any(name.endswith(".safetensors") for name in names):
        return None
    if len(files) > 1:
        raise VilaDeployError(
            f"holds {len(files)} quantized models: {short(files[0])}, {short(files[1])}"
            + (", …" if len(files) > 2 else ""),
            where=folder,
            fix="remove all but the one to use",
        )
    return folder / files[0]


def unread_note(layout: Layout) -> str | None:
    """Return a line where a *-v2.pt lies beside the weights that are read; None for none.

    As NVILA-AWQ's, which people put beside NVILA-8B's shards.
    """
    if WEIGHTS_FILE in layout.llm or tinychat_file(layout.llm) is not None:
        return None
    for folder in (layout.folder("llm"), layout.root):
        for name in _names(folder):
            if name.endswith(SUFFIX):
                where = "" if folder == layout.folder("llm") else "move it into llm/, and "
                return (
                    f"note: {short(name)} is not read, the safetensors files of llm/ are; to use "
                    f'it, {where}write "{WEIGHTS_FILE}": "{printable(name)}" into llm/config.json'
                )
    return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208  names only: links may lead nowhere
    except OSError as error:
        raise VilaDeployError(
            f"cannot be read ({error.strerror})", where=folder, fix="check its permissions"
        ) from error


def group_size(file: Path) -> int:
    """Return how many input channels share a scale, from the file's name or else from its tensors.

    Raises:
        VilaDeployError: the name's isn't one that TinyChat has, or the file can't be read.
    """
    named = GROUP_IN_NAME.findall(file.name)
    if not named:
        return _stored_group_size(PickledFile(file).infos(), file)
    # The last match: before it comes the model's name, which may hold anything.
    size = int(named[-1])
    if size not in GROUP_SIZES:
        raise VilaDeployError(
            f"its name says groups of {size}, TinyChat has 128, 64 and 32",
            where=file,
            fix="correct the name",
        )
    return size


def read_tinychat(file: Path, expected_group_size: int) -> dict[str, TensorInfo]:
    """Return every tensor of `file`.

    Raises:
        VilaDeployError: it can't be read, or its groups are not of `expected_group_size`.
    """
    tensors = PickledFile(file).infos()
    stored = _stored_group_size(tensors, file)
    if stored != expected_group_size:
        raise VilaDeployError(
            f"its name says groups of {expected_group_size}, its scales are for {stored}",
            where=file,
            fix=f"rename it: -g{stored}- in place of -g{expected_group_size}-",
        )
    return tensors


def _stored_group_size(tensors: Mapping[str, TensorInfo], file: Path) -> int:
    """Return it from the first quantized linear: its rows of scales and its input channels."""
    for name, info in tensors.items():
        prefix, _, kind = name.rpartition(".")
        scales = tensors.get(f"{prefix}.scales")
        if kind == "qweight" and f"{prefix}.qzeros" in tensors:
            raise VilaDeployError(
                f"tensor {prefix[:120]}.qzeros belongs to TinyChat's first format",
                where=file,
                fix="convert the file with llm-awq's tinychat/offline-weight-repacker.py",
            )
        if kind != "qweight" or scales is None or len(info.shape) != 2 or not scales.shape:
            continue
        size = group_size_of(info.shape[1], scales.shape[0])
        if size is None:
            raise VilaDeployError(
                f"tensor {prefix[:120]}.scales has {scales.shape[0]} rows, which no group size of "
                f"128, 64 or 32 gives for {info.shape[1]} input channels",
                where=file,
                fix="download this file again",
            )
        return size
    raise VilaDeployError(
        "holds no quantized linear (no .qweight with .scales)",
        where=file,
        fix="use the file that llm-awq's --dump_quant wrote",
    )
