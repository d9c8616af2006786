"""A work folder into which several programs with `--layers` write, on one computer or on several.

All of them share state.json. `--resume` without `--layers` joins the layers to a checkpoint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.lora import Adapter
from vila_deploy.quantize.layer_files import FinishedLayer, layer_files, read_sources
from vila_deploy.quantize.layer_range import layers_text
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.resume import (
    CALIBRATION,
    WorkFolder,
    finished_layers,
    hint_of_finished_layers,
    made_from,
    new_work_path,
    state_of,
    threads_as_before,
)
from vila_deploy.quantize.work_locks import claimed, claims_locked, held_claims, locked
from vila_deploy.quantize.work_state import (
    BEGIN_AGAIN,
    State,
    read_state,
    refuse_change,
    write_state,
)
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import new_folder


class SharedWorkFolder(WorkFolder):
    """A work folder that other programs write to at the same time; see `shared_work_folder`."""

    def __init__(self, path: Path, state: State, files: dict[int, Path], checkpoint: Checkpoint):
        super().__init__(path, state, files, checkpoint)
        self._compared = set(files.values())

    def check_calibration(self, sha256: str) -> None:
        with claims_locked(self.path):
            before = read_state(self.path)
            state = {**before, CALIBRATION: sha256}
            if before.get(CALIBRATION) is None:
                write_state(self.path, state)
            else:
                refuse_change(self.path, before, state)

    def save(self, index: int, layer: FinishedLayer) -> None:
        self._refuse_other_weights(index)
        super().save(index, layer)

    def _refuse_other_weights(self, index: int) -> None:
        """Raise VilaDeployError if other programs' layers were made from other files of weights."""
        sources = self._checkpoint.digests(made_from(index))
        for file in set(layer_files(self.path)) - self._compared:
            theirs = read_sources(file)
            if other := [n for n in sources if n in theirs and sources[n] != theirs[n]]:
                raise VilaDeployError(
                    f"{file.name} was made from another {other[0]} than this checkpoint's",
                    where=self.path,
                    fix=f"give all programs the same checkpoint; or {BEGIN_AGAIN}",
                )
            self._compared.add(file)

    def remaining(self) -> list[int]:
        """Return the layers that no program has finished."""
        done = {int(file.name.split("-")[1]) for file in layer_files(self.path)}
        return [n for n in range(self._checkpoint.config.llm.num_layers) if n not in done]


@contextmanager
def shared_work_folder(
    out: Path,
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    device: torch.device,
    layers: range,
    *,
    resume: bool,
    adapter: Adapter | None = None,
) -> Iterator[SharedWorkFolder]:
    """Yield the work folder beside `out`, created if missing, with a claim on `layers`.

    Args:
        resume: go on from the finished ones of `layers`; otherwise they are refused.
        adapter: that is merged into the checkpoint.

    Raises:
        VilaDeployError: `out` exists; a program is at work on some of `layers`, or one without
            --layers; or the folder was begun with another checkpoint, options or versions.
    """
    path = new_work_path(out)
    if not os.path.lexists(path):
        _create(path, state_of(checkpoint, options, device, adapter))
    read_state(path)
    with locked(path, shared=True), ExitStack() as stack:
        stack.callback(_remove_if_unused, path)
        with claims_locked(path):
            begun = bool(held_claims(path)) or bool(layer_files(path))
            stack.enter_context(claimed(path, layers))
            stack.enter_context(threads_as_before(path, begun=begun))
            state, files = state_of(checkpoint, options, device, adapter), dict[int, Path]()
            if begun:
                state, files = finished_layers(path, state, checkpoint)
            else:
                write_state(path, state)
        if not resume and (done := files.keys() & set(layers)):
            raise VilaDeployError(
                f"{layers_text(done)} finished before",
                where=path,
                fix=f"--resume goes on from there; or give other --layers; or {BEGIN_AGAIN}",
            )
        work = SharedWorkFolder(path, state, files, checkpoint)
        with hint_of_finished_layers(work):
            yield work


def _create(path: Path, state: State) -> None:
    try:
        with new_folder(path) as folder:
            write_state(folder, state)
    except VilaDeployError:
        # Another program has made it meanwhile.
        if not path.is_dir():
            raise


def _remove_if_unused(path: Path) -> None:
    """Remove a work folder without finished layers unless other programs are at work in it."""
    with claims_locked(path):
        if not held_claims(path) and not layer_files(path):
            shutil.rmtree(path, ignore_errors=True)
