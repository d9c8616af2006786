"""Keep finished layers in a work folder, so that `vila-quantize --resume` goes on from them.

`OUT.partial` holds state.json, the inputs that the quantization was begun with, and one safetensors
file per finished decoder layer, whose name ends in the SHA-256 of its bytes. Each names the files
of weights that it was made from, so not all of these must be hashed before the first layer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, layer_prefix
from vila_deploy.checkpoint.lora import Adapter
from vila_deploy.formats.awq import AWQ_GEMM
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.quantize.estimate.plan import work_path
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.report import versions
from vila_deploy.utils.errors import OUT_OF_MEMORY, VilaDeployError, out_of_memory, short
from vila_deploy.utils.files import (
    canonical_json,
    check_new,
    is_empty_folder,
    new_folder,
    read_json_object,
    replace_file,
    sha256_file,
)
from vila_deploy.writers.folder import packed, save_tensors

STATE_FILE, LOCK_FILE = "state.json", "lock"
LAYER_FILE = re.compile(r"layer-(\d{5,})-([0-9a-f]{64})\.safetensors")
TEMPORARY_SUFFIX = ".tmp"
CHECKPOINT, CALIBRATION = "the checkpoint", "the calibration data"
# Sums come out differently when they are split among another number of threads.
THREADS = "OMP_NUM_THREADS"
MAX_THREADS = 1024
ADAPTER = "the adapter of --lora"
BEGIN_AGAIN = "remove this folder to begin again, or choose another -o"

State = dict[str, Any]


@dataclass(frozen=True)
class FinishedLayer:
    """A finished decoder layer.

    Args:
        tensors: norms and linears in the order in which they are written, by their names.
        entry: its entry in the report.
        seconds: how long it took.
    """

    tensors: dict[str, Tensor | QuantizedLinear]
    entry: dict[str, Any]
    seconds: float


class _ChangedError(VilaDeployError):
    """Raised when the finished layers do not fit the run that would use them."""


class WorkFolder:
    """Finished layers and the state that they depend on; made by `work_folder`.

    Args:
        state: everything but weights that the layers depend on, by its name in messages.
        files: of the finished layers, by index.
        checkpoint: the one that is quantized.
    """

    def __init__(self, path: Path, state: State, files: dict[int, Path], checkpoint: Checkpoint):
        self.path, self._state, self._files = path, state, files
        self._checkpoint = checkpoint

    @property
    def finished(self) -> frozenset[int]:
        """Indices of the finished layers."""
        return frozenset(self._files)

    @property
    def layer_bytes(self) -> int:
        """Bytes on the disk of the finished layers."""
        return sum(file.stat().st_size for file in self._files.values())

    def check_calibration(self, sha256: str) -> None:
        """Record the calibration data.

        Raises:
            VilaDeployError: the finished layers were made with other data.
        """
        state = {**self._state, CALIBRATION: sha256}
        if self._files:
            _refuse_change(self.path, self._state, state)
        else:
            _write_state(self.path, state)
        self._state = state

    def save(self, index: int, layer: FinishedLayer) -> None:
        """Write a layer; it counts as finished once its file has its final name."""
        temporary = self.path / f"layer-{index:05d}{TEMPORARY_SUFFIX}"
        # Neither safetensors nor canonical JSON keeps an order, which shards and tables depend on.
        metadata = {
            "tensors": {n: _group_size(value) for n, value in layer.tensors.items()},
            "entry": layer.entry,
            "seconds": layer.seconds,
            "sources": self._checkpoint.digests(_made_from(index)),
        }
        stored: dict[str, Tensor] = {}
        for name, value in layer.tensors.items():
            stored |= packed(name, value, AWQ_GEMM)
        save_tensors(stored, temporary, {"layer": json.dumps(metadata)})
        file = self.path / f"layer-{index:05d}-{sha256_file(temporary)}.safetensors"
        replace_file(temporary, file)
        self._files[index] = file

    def load(self, index: int) -> FinishedLayer:
        """Return a finished layer as it was saved."""
        return _read_layer(self._files[index])[0]


@contextmanager
def work_folder(
    out: Path,
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    device: torch.device,
    *,
    resume: bool,
    adapter: Adapter | None = None,
) -> Iterator[WorkFolder]:
    """Yield the work folder beside `out`, created if missing, locked against other programs.

    After an error it stays, unless no layer is finished by then.

    Args:
        resume: use finished layers; otherwise they are refused.
        adapter: that is merged into the checkpoint.

    Raises:
        VilaDeployError: `out` exists, the folder is in use or not a work folder, or its layers are
            of another checkpoint, other options or other versions, or refused.
    """
    if not out.name:
        check_new(out)
    path = work_path(out)
    exists = os.path.lexists(path)
    if exists and os.path.lexists(out) and not is_empty_folder(out):
        raise VilaDeployError(
            f"exists, and so does {path.name}",
            where=out,
            fix="remove the latter if the output is what you wanted, otherwise the former",
        )
    check_new(out)
    if not exists:
        with new_folder(path) as folder:
            _write_state(folder, _state_of(checkpoint, options, device, adapter))
    # A folder that is no work folder stays as it is.
    _read_state(path)
    with _locked(path), _threads_as_before(path):
        if not resume:
            refuse_finished_layers(out)
        work = _open(path, _state_of(checkpoint, options, device, adapter), checkpoint)
        if resume:
            print(f"{path}: {len(work.finished) or 'no'} finished layers found", file=sys.stderr)
        try:
            yield work
        except Exception as error:
            changed = isinstance(error, _ChangedError)
            expected = isinstance(error, VilaDeployError) and not changed
            if not work.finished or not (expected or out_of_memory(error)):
                raise
            raise _with_hint(error) from error
        finally:
            if not work.finished:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _threads_as_before(path: Path) -> Iterator[None]:
    """Use as many threads as the finished layers in `path`, on however many cores."""
    usual, before = torch.get_num_threads(), _read_state(path).get(THREADS)
    # Not isinstance: True is no number of threads.
    if type(before) is not int or not 1 <= before <= MAX_THREADS or before == usual:
        yield
        return
    if not _layer_files(path):
        yield
        return
    print(
        f"{path}: was begun with {before} threads and goes on with as many, "
        f"not with this computer's {usual}, for the same bytes",
        file=sys.stderr,
    )
    torch.set_num_threads(before)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def _with_hint(error: Exception) -> VilaDeployError:
    hint = "finished layers are kept: --resume goes on from there, unless their weights change"
    if not isinstance(error, VilaDeployError):
        return VilaDeployError(OUT_OF_MEMORY, fix=hint)
    return VilaDeployError(
        error.what, where=error.where, fix=f"{error.fix}; {hint}" if error.fix else hint
    )


def refuse_finished_layers(out: Path) -> None:
    """Raise VilaDeployError if a run that ended early has left finished layers."""
    path = work_path(out)
    count = len(_layer_files(path))
    if count:
        raise VilaDeployError(
            f"holds {count} finished layers of a run that ended early",
            where=path,
            fix=f"--resume goes on from there; or {BEGIN_AGAIN}",
        )


def _layer_files(path: Path) -> list[Path]:
    files = sorted(path.iterdir()) if path.is_dir() else []
    return [file for file in files if LAYER_FILE.fullmatch(file.name)]


def _made_from(index: int) -> tuple[str, ...]:
    """Return the prefixes of the names of all tensors that a layer depends on."""
    return (EMBEDDING, *(f"{layer_prefix(layer)}." for layer in range(index + 1)))


def _state_of(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    device: torch.device,
    adapter: Adapter | None,
) -> State:
    """Return everything but weights that the layers depend on, by its name in messages."""
    return {
        CHECKPOINT: checkpoint.outline(),
        CALIBRATION: None,
        "--algorithm": options.algorithm,
        "--group-size": options.scheme.group_size,
        "--symmetric": options.scheme.symmetric,
        "--seed": options.seed,
        "--prompt-template": options.prompt_template,
        ADAPTER: None if adapter is None else adapter.sha256,
        "--device": device.type,
        THREADS: torch.get_num_threads(),
        **versions(),
    }


def _open(path: Path, state: State, checkpoint: Checkpoint) -> WorkFolder:
    before, layer_files = _read_state(path), _layer_files(path)
    for file in path.glob(f"*{TEMPORARY_SUFFIX}"):
        file.unlink()
    if not layer_files:
        _write_state(path, state)
        return WorkFolder(path, state, {}, checkpoint)
    _refuse_change(path, before, {**state, CALIBRATION: before.get(CALIBRATION)})
    files: dict[int, Path] = {}
    for file in layer_files:
        if (layer := _index_and_sources(file)) is None:
            print(f"{file}: damaged, is computed again", file=sys.stderr)
            file.unlink()
            continue
        index, sources = layer
        if checkpoint.digests(_made_from(index)) != sources:
            raise _changed(path, f"{CHECKPOINT} has changed")
        files[index] = file
    return WorkFolder(path, before, files, checkpoint)


def _index_and_sources(file: Path) -> tuple[int, dict[str, str]] | None:
    """Return a layer's index and digests of its sources; None if its file is damaged."""
    match = LAYER_FILE.fullmatch(file.name)
    if not match or sha256_file(file) != match[2]:
        return None
    layer, sources = _read_layer(file)
    # The entry has the index too, so that a renamed file is not taken for another layer.
    return (int(match[1]), sources) if layer.entry["layer"] == int(match[1]) else None


def _group_size(value: Tensor | QuantizedLinear) -> int | None:
    return value.group_size if isinstance(value, QuantizedLinear) else None


def _read_layer(file: Path) -> tuple[FinishedLayer, dict[str, str]]:
    """Return a layer, and the digests of the files of weights that it was made from."""
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["layer"])
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors: dict[str, Tensor | QuantizedLinear] = {}
    for name, group_size in metadata["tensors"].items():
        if group_size is None:
            tensors[name] = stored[name]
        else:
            prefix = f"{name}."
            parts = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
            tensors[name] = AWQ_GEMM.unpack(parts, group_size)
    return FinishedLayer(tensors, metadata["entry"], metadata["seconds"]), metadata["sources"]


def _refuse_change(path: Path, before: State, after: State) -> None:
    for name in {**after, **before}:
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        values = f"was {short(old)} and is {short(new)} now"
        raise _changed(path, f"{name} {'has changed' if name.startswith('the ') else values}")


def _changed(path: Path, what: str) -> _ChangedError:
    fix = f"go back to what it was; or {BEGIN_AGAIN}"
    return _ChangedError(f"{what} since this was begun", where=path, fix=fix)


def _write_state(path: Path, state: State) -> None:
    temporary = path / f"{STATE_FILE}{TEMPORARY_SUFFIX}"
    temporary.write_text(canonical_json({**state, "sha256": _digest(state)}), "utf-8")
    replace_file(temporary, path / STATE_FILE)


def _read_state(path: Path) -> State:
    try:
        state = read_json_object(path / STATE_FILE)
    except VilaDeployError as error:
        raise VilaDeployError(error.what, where=error.where, fix=BEGIN_AGAIN) from error
    if state.pop("sha256", None) != _digest(state):
        raise VilaDeployError("is damaged", where=path / STATE_FILE, fix=BEGIN_AGAIN)
    return state


def _digest(state: State) -> str:
    return hashlib.sha256(canonical_json(state).encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other programs out while this is open; the lock ends with the program."""
    # Network file systems can lock files that are open for writing, if anything.
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Some have no locks at all; then the user must take care.
        with suppress(OSError):
            _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    busy = VilaDeployError(
        "another program is at work in it", where=path, fix="wait for it or choose another -o"
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise busy from error
    # A program that has just finished removes the folder.
    if not (path / LOCK_FILE).exists():
        raise busy
