"""Tensors out of a file that torch.save wrote, with nothing in it ever executed.

The file is a zip archive: data.pkl, a pickle that builds a dictionary of tensors, and the bytes of
each storage uncompressed, so that they can be mapped. A pickle can call any function; three checks
stand before that. The archive must be as torch.save writes it; the pickle may name nothing but the
constructors of plain tensors; and torch's unpickler for weights alone reads it.
"""

from __future__ import annotations

import pickletools
import re
import stat
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.checkpoint.safetensors_header import MAX_DIMENSIONS, MAX_HEADER_BYTES, TensorInfo
from vila_deploy.utils.errors import VilaDeployError, short, unreadable

if TYPE_CHECKING:
    from torch import Tensor

# What the state_dict of a model is made of, as pickle's GLOBAL names it.
PLAIN = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w+Storage"
)
PROTOCOL = 2
_LFS_POINTER = b"version https://git-lfs"
_DOWNLOAD = "download this file again"
_DISTRUST = "get it from a source that you trust, or use a checkpoint in safetensors"


class PickledFile:
    """The tensors of a torch.save file by name, mapped rather than read: don't write into them.

    Args:
        may_be_empty: take a file without tensors.

    Raises:
        VilaDeployError: the file is missing, damaged or of another kind, holds anything but
            contiguous tensors under text names, or needs code to be run.
    """

    def __init__(self, path: Path, *, may_be_empty: bool = False):
        _check_archive(path)
        self._path, self._tensors = path, _load(path, may_be_empty)

    def get_tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise _error(self._path, f"tensor {name[:120]} is no longer in it")
        return self._tensors[name]

    def infos(self) -> dict[str, TensorInfo]:
        """Return the file's tensors; `begin` and `end` count from each tensor's start."""
        names = _dtype_names()
        return {
            name: TensorInfo(
                name, names[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes, self._path
            )
            for name, tensor in self._tensors.items()
        }


def is_search_result(path: Path) -> bool:
    """Return whether `path` holds what llm-awq's search found: scales and clips, no weights."""
    try:
        PickledFile(path)
    except SearchResultError:
        return True
    except VilaDeployError:
        return False
    return False


class SearchResultError(VilaDeployError):
    """The file is llm-awq's search result, which users mistake for the model (its issue #160)."""

    def __init__(self, path: Path):
        super().__init__(
            "holds the scales and clips of an AWQ search, not the quantized weights",
            where=path,
            fix="pack it with llm-awq's --q_backend real --dump_quant, or run vila-quantize on "
            "the original fp16 checkpoint",
        )


def _check_archive(path: Path) -> None:
    """Return the zip archive and the names in its pickle; needs no torch."""
    try:
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(path, "is no regular file")
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise VilaDeployError(
                    "is a Git LFS pointer, not the weights", where=path, fix="run 'git lfs pull'"
                )
        with zipfile.ZipFile(path) as archive:
            content = _pickle_bytes(path, archive)
    except OSError as error:
        raise unreadable(error, path) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError) as error:
        raise _error(
            path, f"is truncated, or not a zip archive as torch.save writes it ({error})"
        ) from error
    _check_names(path, content)


def _pickle_bytes(path: Path, archive: zipfile.ZipFile) -> bytes:
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) != len(entries):
        raise _error(path, "is an archive with two entries of the same name")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _error(path, "is a compressed archive, which torch.save never writes")
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or pickles[0].file_size > MAX_HEADER_BYTES:
        raise _error(path, "is not an archive that torch.save wrote: it needs one small data.pkl")
    return archive.read(pickles[0])


def _check_names(path: Path, content: bytes) -> None:
    """Refuses a pickle that names anything but the parts of plain tensors, without running it."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "PROTO" and argument != PROTOCOL:
                raise _error(path, f"is in pickle protocol {argument}, must be in {PROTOCOL}")
            # STACK_GLOBAL takes its name from the data, so it has no argument here.
            if "GLOBAL" in opcode.name or opcode.name == "INST":
                if PLAIN.fullmatch(str(argument)):
                    continue
                called = "a function" if argument is None else short(argument.replace(" ", "."))
                raise VilaDeployError(
                    f"wants to call {called}, which could run any code, and is not loaded",
                    where=path,
                    fix=_DISTRUST,
                )
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        raise _error(path, f"has a damaged data.pkl ({error})") from error


def _load(path: Path, may_be_empty: bool) -> dict[str, Tensor]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch promises no types here; damage shows as any of them
        if "Cannot allocate memory" in str(error):
            raise VilaDeployError(
                f"its {path.stat().st_size / 1e9:.1f} GB can't be mapped into memory",
                where=path,
                fix="add swap, or let Linux promise more memory (sysctl vm.overcommit_memory=1)",
            ) from error
        reason = next(iter(str(error).splitlines()), "")
        raise _error(
            path, f"cannot be read as tensors ({type(error).__name__}: {reason[:160]})"
        ) from error
    if not isinstance(content, dict):
        raise _error(path, f"holds a {type(content).__name__}, must hold tensors by name")
    if isinstance(content.get("scale"), list) and isinstance(content.get("clip"), list):
        raise SearchResultError(path)
    if not content and not may_be_empty:
        raise _error(path, "holds no tensors")
    return {_checked_name(path, name): _checked(path, name, content[name]) for name in content}


def _checked_name(path: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise _error(path, f"holds a tensor named {short(name)}, must be text")
    return name


def _checked(path: Path, name: str, value: Any) -> Tensor:
    """`value` as a plain tensor, refused if it is anything that safetensors could not hold."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise VilaDeployError(
            f"holds {type(value).__name__} under {short(name)}, must hold tensors only",
            where=path,
            fix="use the file that llm-awq's --dump_quant wrote",
        )
    # Layout first: a sparse or quantized tensor has no strides or dtype to speak of.
    if value.layout != torch.strided or value.device.type != "cpu":
        raise _error(path, f"tensor {name[:120]} has no plain storage")
    if value.dtype not in _dtype_names():
        raise _error(path, f"tensor {name[:120]}: dtype {value.dtype} is not supported")
    if value.ndim > MAX_DIMENSIONS or not value.is_contiguous():
        raise _error(path, f"tensor {name[:120]} is not stored contiguously")
    return value.detach()


def _dtype_names() -> dict[Any, str]:
    """torch's dtypes as safetensors spells them."""
    import torch

    return {
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float64: "F64",
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.int16: "I16",
        torch.int32: "I32",
        torch.int64: "I64",
    }


def _error(path: Path, what: str) -> VilaDeployError:
    return VilaDeployError(what, where=path, fix=_DOWNLOAD)
