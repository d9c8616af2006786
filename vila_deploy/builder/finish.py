"""Finishes an engine folder on the device that it is for: the steps that its manifest still needs.

A backend that leaves steps to the device has, in its build module,

- `check_device(folder, manifest)`, which raises what is missing here before any work;
- `outputs(need)`, the paths in the folder that a step makes;
- `finish_step(folder, manifest, need)`, which makes them and returns the versions of its tools;
- `spent(folder, need)`, the files in it that nothing needs any more once a step is done;
- `place(manifest)`, if that is not always the device: in words, where the steps can be done.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from vila_deploy.backends import BACKENDS
from vila_deploy.engine.manifest import MANIFEST, Manifest, load_manifest, write_manifest
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import read_json_object


def is_engine(folder: Path) -> bool:
    """Whether vila-build-engine made `folder`, finished or not."""
    return os.path.lexists(folder / MANIFEST)


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` is an engine with steps that are left for the device."""
    return is_engine(folder) and bool(read_json_object(folder / MANIFEST).get("needs"))


def finish_engine(folder: Path, target: str, backend: str | None) -> Manifest:
    """Does what is left, a step at a time; one that was finished earlier is not done again.

    Args:
        target, backend: what the user asks for, which must be what the folder was built for.

    Raises:
        VilaDeployError: built for something else, an altered file, a tool that isn't here, or a
            step that fails; steps before it stay done.
    """
    _remove_begun(folder)
    manifest = load_manifest(folder)
    for option, asked, found in (
        ("--target", target, manifest.target),
        ("--backend", backend or manifest.backend, manifest.backend),
    ):
        if asked != found:
            raise VilaDeployError(
                f"was begun with {option} {found}, not {asked}",
                where=folder,
                fix=f"give {option} {found}, or choose another -o",
            )
    module = _module(manifest.backend)
    module.check_device(folder, manifest)
    while manifest.needs:
        need, *rest = manifest.needs
        versions = module.finish_step(folder, manifest, need)
        manifest = replace(manifest, needs=tuple(rest), versions={**manifest.versions, **versions})
        spent = module.spent(folder, need)
        write_manifest(folder, manifest, without=spent)
        _remove(folder, spent)
    return manifest


def _remove(folder: Path, paths: Sequence[str]) -> None:
    """Files of `folder`, and folders that they leave empty."""
    for path in paths:
        (folder / path).unlink(missing_ok=True)
    for parent in {(folder / path).parent for path in paths} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def can_finish_here(folder: Path, manifest: Manifest) -> bool:
    """Whether this computer has what the steps that are left need."""
    return _hindrance(folder, manifest) is None


def finish_only_here(folder: Path, manifest: Manifest) -> Manifest:
    """Does what is left of an engine that can't be taken elsewhere.

    Raises:
        VilaDeployError: this computer lacks what that needs, or a step fails.
    """
    if not manifest.needs:
        return manifest
    hindrance = _hindrance(folder, manifest)
    if hindrance is not None:
        raise finished_elsewhere(manifest, hindrance.what) from hindrance
    return finish_engine(folder, manifest.target, manifest.backend)


def finished_elsewhere(manifest: Manifest, reason: str) -> VilaDeployError:
    """For an engine of random weights, which nobody could take to where it would be finished."""
    return VilaDeployError(
        f"the engine for {manifest.target} can't be finished here ({reason})",
        fix="build one from a checkpoint with vila-build-engine, finish it on "
        f"{finish_location(manifest)} and give its folder to vila-bench there",
    )


def _hindrance(folder: Path, manifest: Manifest) -> VilaDeployError | None:
    """What this computer lacks for the steps that are left."""
    try:
        _module(manifest.backend).check_device(folder, manifest)
    except VilaDeployError as error:
        return error
    return None


def finish_location(manifest: Manifest) -> str:
    """Where the steps that are left can be done, in words."""
    place = getattr(_module(manifest.backend), "place", None)
    return place(manifest) if place else "the device"


def _remove_begun(folder: Path) -> None:
    """What a killed step left: it made its files, but the manifest does not list them yet."""
    values = read_json_object(folder / MANIFEST)
    listed = values.get("files", {})
    (folder / f".{MANIFEST}.partial").unlink(missing_ok=True)
    if values.get("backend") not in BACKENDS:
        return
    module: Any = _module(values["backend"])
    for need in values.get("needs", []):
        for path in module.outputs(need):
            if path not in listed and not any(name.startswith(f"{path}/") for name in listed):
                shutil.rmtree(folder / path, ignore_errors=True)
                if (folder / path).is_file():
                    (folder / path).unlink()


def _module(backend: str) -> Any:
    return import_module(f"{BACKENDS[backend]}.build")
