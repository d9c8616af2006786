"""Finish an engine folder on its device: the steps that its manifest still has pending."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vila_deploy.backends.registry import BACKENDS, get_backend
from vila_deploy.engine.manifest import (
    MANIFEST,
    Manifest,
    listed_files,
    load_manifest,
    read_manifest,
    unlisted_files,
    write_manifest,
)
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import read_json_object


def is_engine(folder: Path) -> bool:
    """Return whether vila-build-engine made `folder`, finished or not."""
    return os.path.lexists(folder / MANIFEST)


def is_unfinished(folder: Path) -> bool:
    """Return whether `folder` is an engine with steps that are left for the device."""
    return is_engine(folder) and bool(read_json_object(folder / MANIFEST).get("needs"))


def finish_engine(folder: Path, asked_target: str, asked_backend: str | None) -> Manifest:
    """Do the pending steps one by one; what was finished earlier is not done again.

    Args:
        asked_target, asked_backend: must be what the folder was built for; None is any backend.

    Raises:
        VilaDeployError: built for something else, an altered file, a tool that isn't here, or a
            step that fails; steps before it stay done.
    """
    _remove_half_made(folder)
    manifest = load_manifest(folder)
    asked = manifest.backend if asked_backend is None else asked_backend
    for option, wanted, found in (
        ("--target", asked_target, manifest.target),
        ("--backend", asked, manifest.backend),
    ):
        if wanted != found:
            raise VilaDeployError(
                f"was begun with {option} {found}, not {wanted}",
                where=folder,
                fix=f"give {option} {found}, or choose another -o",
            )
    backend = get_backend(manifest.backend)
    backend.check_device(folder, manifest)
    users_files = unlisted_files(folder)
    while manifest.pending_steps:
        step, *rest = manifest.pending_steps
        versions = {**manifest.versions, **backend.finish_step(folder, manifest, step)}
        manifest = replace(manifest, pending_steps=tuple(rest), versions=versions)
        intermediates = backend.intermediates(folder, step)
        write_manifest(folder, manifest, without=(*intermediates, *users_files))
        _remove(folder, intermediates)
    return manifest


def _remove(folder: Path, paths: Sequence[str]) -> None:
    """Remove files of `folder`, and folders that they leave empty."""
    for path in paths:
        (folder / path).unlink(missing_ok=True)
    for parent in {(folder / path).parent for path in paths} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def can_finish_here(folder: Path, manifest: Manifest) -> bool:
    """Return whether this computer has what the pending steps need."""
    return _device_problem(folder, manifest) is None


def finish_only_here(folder: Path, manifest: Manifest) -> Manifest:
    """Do the pending steps of an engine that can't be taken elsewhere.

    Raises:
        VilaDeployError: this computer lacks what that needs, or a step fails.
    """
    if not manifest.pending_steps:
        return manifest
    problem = _device_problem(folder, manifest)
    if problem is not None:
        raise finished_elsewhere(manifest, problem.what) from problem
    return finish_engine(folder, manifest.target, manifest.backend)


def finished_elsewhere(manifest: Manifest, reason: str) -> VilaDeployError:
    """Return the error for an engine of random weights, which nobody would take elsewhere."""
    location = get_backend(manifest.backend).finish_location(manifest)
    return VilaDeployError(
        f"the engine for {manifest.target} can't be finished here ({reason})",
        fix="build one from a checkpoint with vila-build-engine, finish it on "
        f"{location} and give its folder to vila-bench there",
    )


def _device_problem(folder: Path, manifest: Manifest) -> VilaDeployError | None:
    """What this computer lacks for the pending steps; None if it has all."""
    try:
        get_backend(manifest.backend).check_device(folder, manifest)
    except VilaDeployError as error:
        return error
    return None


def _remove_half_made(folder: Path) -> None:
    """Remove what a killed step left: files that it made, but that the manifest doesn't list."""
    manifest = read_manifest(folder)
    listed = listed_files(folder)
    (folder / f".{MANIFEST}.partial").unlink(missing_ok=True)
    if manifest.backend not in BACKENDS:
        return
    backend = get_backend(manifest.backend)
    for step in manifest.pending_steps:
        for path in backend.artifacts(step):
            if path not in listed and not any(name.startswith(f"{path}/") for name in listed):
                shutil.rmtree(folder / path, ignore_errors=True)
                if (folder / path).is_file():
                    (folder / path).unlink()
