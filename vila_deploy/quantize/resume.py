"""Keep finished layers in a work folder, so that `vila-quantize --resume` goes on from them.

`OUT.partial` holds state.json, the inputs that the quantization was begun with, and one safetensors
file per finished decoder layer, whose name ends in the SHA-256 of its bytes. Each names the files
of weights that it was made from, so not all of these must be hashed before the first layer.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, layer_prefix
from vila_deploy.checkpoint.lora import Adapter
from vila_deploy.quantize.bit_choice import BitChoice
from vila_deploy.quantize.estimate.plan import work_path
from vila_deploy.quantize.layer_files import (
    FinishedLayer,
    index_and_sources,
    layer_files,
    read_layer,
    save_layer,
)
from vila_deploy.quantize.layer_range import layers_text, ranges_text
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.report import versions
from vila_deploy.quantize.work_locks import claims, locked
from vila_deploy.quantize.work_state import (
    BEGIN_AGAIN,
    TEMPORARY_SUFFIX,
    ChangedError,
    State,
    changed,
    read_state,
    refuse_change,
    write_state,
)
from vila_deploy.utils.errors import OUT_OF_MEMORY, VilaDeployError, out_of_memory
from vila_deploy.utils.files import check_new, is_empty_folder, new_folder

CHECKPOINT, CALIBRATION = "the checkpoint", "the calibration data"
BIT_CHOICE = "the bits of each linear"
# Sums come out differently when they are split among another number of threads.
THREADS = "OMP_NUM_THREADS"
MAX_THREADS = 1024
ADAPTER = "the adapter of --lora"


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
            refuse_change(self.path, self._state, state)
        else:
            write_state(self.path, state)
        self._state = state

    def bit_choice(self, choose: Callable[[], BitChoice]) -> BitChoice:
        """Return the bits that the finished layers have; without any, what `choose` gives."""
        if self._files and self._state.get(BIT_CHOICE):
            return BitChoice.from_json(self._state[BIT_CHOICE])
        choice = choose()
        self._state = {**self._state, BIT_CHOICE: choice.to_json()}
        write_state(self.path, self._state)
        return choice

    def save(self, index: int, layer: FinishedLayer) -> None:
        """Write a layer; it counts as finished once its file has its final name."""
        sources = self._checkpoint.digests(made_from(index))
        self._files[index] = save_layer(self.path, index, layer, sources)

    def load(self, index: int) -> FinishedLayer:
        """Return a finished layer as it was saved."""
        return read_layer(self._files[index])[0]


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
    path = new_work_path(out)
    if not os.path.lexists(path):
        with new_folder(path) as folder:
            write_state(folder, state_of(checkpoint, options, device, adapter))
    # A folder that is no work folder stays as it is.
    read_state(path)
    with locked(path), threads_as_before(path, begun=bool(layer_files(path))):
        if not resume:
            refuse_finished_layers(out)
            for claim in claims(path):
                claim.file.unlink()
        work = _open(path, state_of(checkpoint, options, device, adapter), checkpoint)
        if resume:
            print(f"{path}: {len(work.finished) or 'no'} finished layers found", file=sys.stderr)
        _refuse_missing_layers(path, set(range(checkpoint.config.llm.num_layers)) - work.finished)
        try:
            with hint_of_finished_layers(work):
                yield work
        finally:
            if not work.finished:
                shutil.rmtree(path, ignore_errors=True)


def new_work_path(out: Path) -> Path:
    """Return the path of the work folder of `out`, which must not exist."""
    if not out.name:
        check_new(out)
    path = work_path(out)
    if os.path.lexists(path) and os.path.lexists(out) and not is_empty_folder(out):
        raise VilaDeployError(
            f"exists, and so does {path.name}",
            where=out,
            fix="remove the latter if the output is what you wanted, otherwise the former",
        )
    check_new(out)
    return path


def _refuse_missing_layers(path: Path, missing: set[int]) -> None:
    """Raise VilaDeployError if the layers were divided by --layers and some are missing."""
    if missing and claims(path):
        raise VilaDeployError(
            f"{layers_text(missing)} {'is' if len(missing) == 1 else 'are'} not finished",
            where=path,
            fix=f"run the command with --layers {ranges_text(missing)} first; or {BEGIN_AGAIN}",
        )


@contextmanager
def hint_of_finished_layers(work: WorkFolder) -> Iterator[None]:
    """Add to an error that finished layers are kept, if there are any and they can be used."""
    try:
        yield
    except Exception as error:
        expected = isinstance(error, VilaDeployError) and not isinstance(error, ChangedError)
        if not work.finished or not (expected or out_of_memory(error)):
            raise
        raise _with_hint(error) from error


@contextmanager
def threads_as_before(path: Path, *, begun: bool) -> Iterator[None]:
    """Use as many threads as the work in `path` was begun with, on however many cores."""
    usual, before = torch.get_num_threads(), read_state(path).get(THREADS)
    # Not isinstance: True is no number of threads.
    if type(before) is not int or not 1 <= before <= MAX_THREADS or before == usual or not begun:
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
    count = len(layer_files(path))
    if count:
        raise VilaDeployError(
            f"holds {count} finished layers of a run that ended early",
            where=path,
            fix=f"--resume goes on from there; or {BEGIN_AGAIN}",
        )


def made_from(index: int) -> tuple[str, ...]:
    """Return the prefixes of the names of all tensors that a layer depends on."""
    return (EMBEDDING, *(f"{layer_prefix(layer)}." for layer in range(index + 1)))


def state_of(
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
        "--bits-per-weight": options.bits_per_weight,
        "--keep-fp16": list(options.keep_fp16),
        "bits of --format": list(options.widths),
        "--seed": options.seed,
        "--prompt-template": options.prompt_template,
        ADAPTER: None if adapter is None else adapter.sha256,
        "--device": device.type,
        THREADS: torch.get_num_threads(),
        **versions(),
    }


def _open(path: Path, state: State, checkpoint: Checkpoint) -> WorkFolder:
    for file in path.glob(f"*{TEMPORARY_SUFFIX}"):
        file.unlink()
    if not layer_files(path):
        write_state(path, state)
        return WorkFolder(path, state, {}, checkpoint)
    return WorkFolder(path, *finished_layers(path, state, checkpoint), checkpoint)


def finished_layers(
    path: Path, state: State, checkpoint: Checkpoint
) -> tuple[State, dict[int, Path]]:
    """Return the state that the layers in `path` were made with, and their files by index.

    Raises:
        VilaDeployError: it differs from `state`, or the layers were made from other weights.
    """
    before = read_state(path)
    kept = {name: before.get(name) for name in (CALIBRATION, BIT_CHOICE)}
    refuse_change(path, before, {**state, **kept})
    files: dict[int, Path] = {}
    for file in layer_files(path):
        if (layer := index_and_sources(file)) is None:
            print(f"{file}: damaged, is computed again", file=sys.stderr)
            file.unlink(missing_ok=True)
            continue
        index, sources = layer
        if checkpoint.digests(made_from(index)) != sources:
            raise changed(path, f"{CHECKPOINT} has changed")
        files[index] = file
    return before, files
