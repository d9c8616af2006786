"""Read the tensors of one part of a checkpoint: found and checked first, read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.checkpoint.int8_tower import SCALE
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD, LlmConfig
from vila_deploy.checkpoint.safetensors_header import TensorInfo, read_header
from vila_deploy.checkpoint.tensor_schema import check_llm
from vila_deploy.checkpoint.torch_load import PickledFile, SearchResultError, is_search_result
from vila_deploy.formats.base import BITS, HEAD_LINEAR, Packing, QuantizedLinear
from vila_deploy.formats.registry import format_of
from vila_deploy.formats.tinychat import SUFFIX as TINYCHAT_SUFFIX
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.files import read_json_object

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of the part in `folder`: of model.safetensors or an index's shards.

    Raises:
        VilaDeployError: no weights, pickles only, or an index or header that is wrong.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists() and index.exists():
        raise VilaDeployError(
            f"holds both {SINGLE_FILE} and {INDEX_FILE}",
            where=folder,
            fix="remove the one that doesn't belong to this checkpoint",
        )
    if index.exists():
        return _sharded_tensors(folder, weight_map(index), index)
    if single.exists():
        return read_header(single)
    raise _missing(single, folder, f"is missing, and there is no {INDEX_FILE}")


def weight_map(index: Path) -> dict[str, str]:
    """Return tensor name → file name; a file name that leaves the folder is refused."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise VilaDeployError(
            f"must be an object that is not empty, found {short(weight_map)}",
            where=f"{index}: weight_map",
            fix="download this file again",
        )
    for name, file in weight_map.items():
        # A plain name only: no folder, no drive, nothing that some platform splits.
        plain = isinstance(file, str) and not set(file) & set("/\\:\0")
        if not plain or not file.endswith(".safetensors") or file.startswith("."):
            raise VilaDeployError(
                f"must be the name of a .safetensors file in this folder, found {short(file)}",
                where=f"{index}: weight_map.{name[:120]}",
                fix="download this file again from a source that you trust",
            )
    return weight_map


def _sharded_tensors(
    folder: Path, weight_map: Mapping[str, str], index: Path
) -> dict[str, TensorInfo]:
    files = sorted(set(weight_map.values()))
    for file in files:
        if not (folder / file).exists():
            raise _missing(folder / file, folder, f"is missing, but {INDEX_FILE} names it")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(folder / file).items():
            if weight_map.get(name) != file:
                raise VilaDeployError(
                    f"lies in {file}, the index says {short(weight_map.get(name))}",
                    where=f"{index}: {name[:120]}",
                    fix="download the index and its shards again",
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors:
            raise VilaDeployError(
                f"tensor {name[:120]} is not in it, but {INDEX_FILE} says so",
                where=folder / file,
                fix="download this file again",
            )
    return tensors


def _missing(file: Path, folder: Path, what: str) -> VilaDeployError:
    """Return the error for absent weights; usually they were published as pickles."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not pickles:
        return VilaDeployError(what, where=file, fix="download the whole checkpoint")
    tinychat = [name for name in pickles if name.endswith(TINYCHAT_SUFFIX)]
    if tinychat:
        return VilaDeployError(
            f"{what}; {tinychat[0][:120]} is read only where there is no .safetensors file in "
            "llm/ and no quantization_config in its config.json",
            where=file,
            fix="download the whole checkpoint, or remove those to use that file",
        )
    for name in pickles:
        if name.endswith(".pt") and is_search_result(folder / name):
            return SearchResultError(folder / name)
    if "awq" in pickles[0].lower():
        fix = "run vila-quantize on the original fp16 checkpoint instead"
    else:
        fix = "convert it to safetensors first, on a computer where its code may run"
    return VilaDeployError(
        f"{what}; {pickles[0][:120]} is a pickle, which can run code and is never read",
        where=file,
        fix=fix,
    )


class TensorReader:
    """Reads the tensors of one part lazily, memory-mapped, under their on-disk names.

    Args:
        tensors: from `find_tensors`.
        packing: of the quantized linears, if there are any.
        group_size: of the quantized linears.
        bits_of: of linears that have other than 4.
        aliases: names that are not stored, and the tensor that stands for each.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        *,
        packing: Packing | None = None,
        group_size: int = 0,
        bits_of: Mapping[str, int] | None = None,
        aliases: Mapping[str, str] | None = None,
    ):
        self._tensors, self._packing, self._group_size = tensors, packing, group_size
        self._bits_of = bits_of or {}
        self.aliases: Mapping[str, str] = aliases or {}
        self._open_files: dict[Path, Any] = {}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return where every stored tensor lies."""
        return self._tensors

    def names(self) -> list[str]:
        """Return every stored tensor, sorted; tensors that nothing uses are among them."""
        return sorted(self._tensors)

    def files(self) -> list[Path]:
        """Return the files that hold them, sorted."""
        return sorted({info.file for info in self._tensors.values()})

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies, its shape and dtype, without reading it."""
        stored = self.aliases.get(name, name)
        if stored not in self._tensors:
            raise VilaDeployError(
                "the checkpoint has no such tensor",
                where=stored,
                fix="download the whole checkpoint",
            )
        return self._tensors[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        import torch

        info = self.info(name)
        dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        dtypes |= {"F64": torch.float64, "I16": torch.int16, "I32": torch.int32}
        dtypes |= {"I64": torch.int64, "I8": torch.int8}
        if info.dtype not in dtypes:
            raise _unreadable(info, f"dtype {info.dtype} is not supported")
        return dtypes[info.dtype]

    def tensor(self, name: str) -> Tensor:
        """Return the tensor as stored, mapped from the file: don't write into it.

        Raises:
            VilaDeployError: no such tensor, unreadable, or NaN or Inf among its values.
        """
        from safetensors import SafetensorError

        info = self.info(name)
        dtype = self.dtype(name)
        try:
            if info.file not in self._open_files:
                self._open_files[info.file] = _open(info.file)
            tensor: Tensor = self._open_files[info.file].get_tensor(info.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _unreadable(info, f"cannot be read ({error})") from error
        if tensor.dtype != dtype or tuple(tensor.shape) != info.shape:
            raise _unreadable(info, "is not what it was when the file was checked")
        # The format promises no alignment, vectorized code expects it.
        if tensor.data_ptr() % tensor.element_size():
            tensor = tensor.clone()
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise _unreadable(info, "holds NaN or Inf")
        return tensor

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        """Return the weight [out, in] of a linear layer: a tensor as stored, or a quantized linear.

        Raises:
            VilaDeployError: as `tensor` does, or names the tensor that doesn't fit its format.
        """
        packing = self._packing
        if packing is None or f"{prefix}.{packing.marker}" not in self:
            return self.tensor(f"{prefix}.weight")
        tensors = {
            name: self.tensor(f"{prefix}.{name}")
            for name in (*packing.tensors, "bias")
            if f"{prefix}.{name}" in self
        }
        try:
            return packing.unpack(tensors, self._group_size, self._bits_of.get(prefix, BITS))
        except VilaDeployError as error:
            file = self.info(f"{prefix}.{packing.marker}").file
            where = f"{file}: {prefix[:120]}.{error.where}"
            raise VilaDeployError(error.what, where=where, fix=error.fix) from error


class QuantizedHeadReader(TensorReader):
    """A TensorReader of an llm/ whose output head is quantized, and read as floats on demand."""

    def tensor(self, name: str) -> Tensor:
        if name != HEAD:
            return super().tensor(name)
        head = self.linear(HEAD_LINEAR)
        assert isinstance(head, QuantizedLinear)
        return head.dequantize()


class Int8TowerReader(TensorReader):
    """A TensorReader of a tower with linears in int8, which are read as float32, exactly."""

    def tensor(self, name: str) -> Tensor:
        tensor = super().tensor(name)
        if tensor.is_floating_point():
            return tensor
        return tensor.float() * super().tensor(name + SCALE).float()

    def stored(self) -> dict[str, Tensor]:
        """Return all tensors as they are stored, by name."""
        return {name: super(Int8TowerReader, self).tensor(name) for name in self.names()}


def llm_reader(tensors: Mapping[str, TensorInfo], config: LlmConfig, folder: Path) -> TensorReader:
    """Return a reader of llm/ in `folder` whose tensors have been checked against `config`.

    Raises:
        VilaDeployError: names the first tensor that is missing, wrong or unknown.
    """
    check_llm(config, tensors, folder)
    quantization = config.quantization
    reader = QuantizedHeadReader if config.head_is_quantized else TensorReader
    return reader(
        tensors,
        packing=format_of(quantization).packing if quantization else None,
        group_size=quantization.group_size if quantization else 0,
        bits_of=quantization.linear_bits if quantization else None,
        aliases={HEAD: EMBEDDING} if config.tie_word_embeddings else None,
    )


def _open(file: Path) -> Any:
    """Open a file of safetensors or of torch.save; both have `get_tensor`."""
    if file.suffix in PICKLE_SUFFIXES:
        return PickledFile(file)
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or Inf, in one pass: a NaN makes both extremes NaN."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def _unreadable(info: TensorInfo, what: str) -> VilaDeployError:
    return VilaDeployError(
        f"tensor {info.name[:120]} {what}", where=info.file, fix="download this file again"
    )
