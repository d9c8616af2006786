"""manifest.json: the contents of an engine folder, checked byte for byte when it is opened."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.formats.module_dtypes import ACTIVATIONS, INT8X2
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields
from vila_deploy.utils.files import canonical_json, read_json_object, replace_file, sha256_file

# Version 1 has pending steps as sentences, version 2 as ids with titles; both are read.
FORMAT_VERSION = 2
MANIFEST, TOKENIZER_FOLDER = "manifest.json", "tokenizer"
CHECKSUM = "manifest_sha256"
# Files that backends keep to be quicker next time; they change and may be deleted.
CACHE_SUFFIX = ".cache"
# What operating systems leave in folders besides hidden files.
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
HASH_THREADS = 4
# Files that may be checked while they are loaded: altered numbers do no harm until then, and the
# hashes of larger ones take as long as loading them.
LARGE_FILE_BYTES = 1 << 20
NUMBER_SUFFIXES = (".data", ".npy")
REBUILD = "build the engine again with vila-build-engine, or copy it again"


@dataclass(frozen=True)
class Limits:
    """Largest batch, longest prompt and longest prompt with answer, in tokens."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int


STEP_ID = re.compile(r"[a-z][a-z_]*")


@dataclass(frozen=True)
class PendingStep:
    """A step that is left for the device.

    Args:
        id: the name that its backend gives it.
        title: the name that users read.
    """

    id: str
    title: str


# Sentences of format version 1, and the ids of the same steps.
VERSION_1_STEPS = {
    "compile vision/model.onnx with TensorRT": "vision",
    "compile projector/model.onnx with TensorRT": "projector",
    "compile llm/model.onnx with TensorRT": "llm",
    "compile the vision encoder with TensorRT": "vision",
    "build the LLM with trtllm-build": "llm",
}


@dataclass(frozen=True)
class Manifest:
    """Everything about an engine but its weights.

    Args:
        name: what tables call the model.
        weights: "trained" or "random".
        weight_bytes_per_token: bytes of weights that one decoding step reads.
        checkpoint_fingerprint: of the checkpoint that it was built from; None for random weights.
        versions: of the tools that built it; the backend checks what must match.
        pending_steps: steps left for the device; empty when the engine is complete. Key `needs`.
        module_precision: dtype of vision tower, output head and key/value cache. Key `components`.
        accuracy_impact: change of the logits by that, where it was measured (see
            AccuracyImpact.to_json). Key `effect`.
        activations: a name in ACTIVATIONS, of the 4-bit linears of backend onnxruntime.
        defaults: why choices that the user left to the backend are what they are, by option.
        source: repository and commit on the Hugging Face Hub that the checkpoint came from.
        gpu_layers: of backend llamacpp, on the GPU; None: those that fit when it is opened.
    """

    name: str
    target: str
    backend: str
    precision: str
    weights: str
    weight_bytes_per_token: int
    checkpoint_fingerprint: str | None
    limits: Limits
    model: ModelInfo
    versions: Mapping[str, str]
    pending_steps: tuple[PendingStep, ...] = ()
    module_precision: ModulePrecision = ALL_FP16
    accuracy_impact: Mapping[str, Any] | None = None
    activations: str | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] | None = None
    gpu_layers: int | None = None


# Keys in manifest.json of the fields whose names have changed since.
KEYS = {
    "pending_steps": "needs",
    "module_precision": "components",
    "accuracy_impact": "effect",
}
# Written only where they say something.
OPTIONAL_KEYS = ("activations", "defaults", "source", "gpu_layers")


def write_manifest(folder: Path, manifest: Manifest, without: Collection[str] = ()) -> None:
    """Write manifest.json with size and SHA-256 of every other file below `folder`.

    Hidden files and caches are left out. One that is there is replaced at once.

    Args:
        without: paths within `folder` that are about to be removed.
    """
    partial = folder / f".{MANIFEST}.partial"
    left_out = {folder / MANIFEST, partial, *(folder / path for path in without)}
    paths = [path for path in sorted(_own_files(folder)) if path not in left_out]
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        digests = threads.map(sha256_file, paths)
    names = [field.name for field in fields(Manifest)]
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        **{KEYS.get(name, name): getattr(manifest, name) for name in names},
        "limits": vars(manifest.limits),
        "model": manifest.model.to_json(),
        "components": manifest.module_precision.to_json(),
        "needs": [vars(step) for step in manifest.pending_steps],
        "files": {
            path.relative_to(folder).as_posix(): {
                "sha256": digest,
                "size_bytes": path.stat().st_size,
            }
            for path, digest in zip(paths, digests, strict=True)
        },
    }
    for key in OPTIONAL_KEYS:
        if content[key] in (None, {}):
            del content[key]
    content[CHECKSUM] = _digest(content)
    partial.write_text(canonical_json(content), "utf-8")
    replace_file(partial, folder / MANIFEST)


def load_manifest(folder: Path) -> Manifest:
    """Read manifest.json and check every file that it lists; files beside the engine's are fine.

    Raises:
        VilaDeployError: no engine, another format version, or any byte that differs.
    """
    values = _read_fields(folder)
    expected = _listed_files(values)
    _check_names(folder, expected)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        _check_digests(folder, expected, pool)
    return _from_fields(values)


@contextmanager
def checked_meanwhile(folder: Path) -> Iterator[None]:
    """Check the files as `load_manifest` does, large ones of plain numbers while the block runs.

    Raises:
        VilaDeployError: as `load_manifest` does; it takes the place of an error of the block.
    """
    expected = _listed_files(_read_fields(folder))
    _check_names(folder, expected)
    large = {
        name
        for name, facts in expected.items()
        if facts["size_bytes"] >= LARGE_FILE_BYTES and Path(name).suffix in NUMBER_SUFFIXES
    }
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        _check_digests(folder, {n: f for n, f in expected.items() if n not in large}, pool)
        check = pool.submit(_check_digests, folder, {name: expected[name] for name in large}, pool)
        try:
            yield
        finally:
            check.result()


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json alone, in no time; the engine's other files are not looked at.

    Raises:
        VilaDeployError: no engine, another format version, or an altered manifest.
    """
    return _from_fields(_read_fields(folder))


def _read_fields(folder: Path) -> Fields:
    path = folder / MANIFEST
    if not path.is_file():
        what = f"holds no {MANIFEST}" if folder.is_dir() else "no such folder"
        raise VilaDeployError(what, where=folder, fix="give a folder that vila-build-engine made")
    content = read_json_object(path)
    values = Fields(content, path)
    version = values.integer("format_version", low=0)
    if not 1 <= version <= FORMAT_VERSION:
        raise VilaDeployError(
            f"has format version {version}, this vila-deploy reads 1 to {FORMAT_VERSION}",
            where=path,
            fix="build the engine again with this version",
        )
    checksum = content.pop(CHECKSUM, None)
    expected = canonical_json({**content, CHECKSUM: checksum})
    # Comparing the text itself finds changes that parsing forgives, such as white space.
    if checksum != _digest(content) or path.read_text("utf-8") != expected:
        raise VilaDeployError("was altered", where=path, fix=REBUILD)
    return values


def _from_fields(values: Fields) -> Manifest:
    limits = values.child("limits")
    return Manifest(
        name=values.text("name"),
        target=values.text("target"),
        backend=values.text("backend"),
        precision=values.text("precision"),
        weights=values.text("weights"),
        weight_bytes_per_token=values.integer("weight_bytes_per_token", high=1 << 50),
        checkpoint_fingerprint=values.values.get("checkpoint_fingerprint"),
        limits=Limits(
            *(limits.integer(key) for key in ("max_batch_size", "max_input_len", "max_seq_len"))
        ),
        model=ModelInfo.from_fields(values.child("model")),
        versions=values.child("versions").values,
        pending_steps=_pending_steps(values),
        module_precision=ModulePrecision.from_fields(values),
        accuracy_impact=values.child("effect").values if "effect" in values else None,
        activations=_activations(values),
        defaults=values.child("defaults").values if "defaults" in values else {},
        source=values.child("source").values if "source" in values else None,
        gpu_layers=values.integer("gpu_layers", low=0) if "gpu_layers" in values else None,
    )


def _activations(values: Fields) -> str | None:
    """Return how activations enter 4-bit linears; older manifests of the CPU don't say it."""
    if "activations" in values:
        return values.choice("activations", ACTIVATIONS)
    old = values.text("backend") == "onnxruntime" and values.text("precision") == "int4"
    return INT8X2 if old else None


def _pending_steps(values: Fields) -> tuple[PendingStep, ...]:
    """Return the pending steps of a manifest of format version 1 or 2."""
    needs = values.values.get("needs") or []
    if not isinstance(needs, list):
        raise values.error("needs", f"must be a list of steps, found {short(needs)}", REBUILD)
    return tuple(_pending_step(values, step) for step in needs)


def _pending_step(values: Fields, step: Any) -> PendingStep:
    if isinstance(step, str):
        step = {"id": VERSION_1_STEPS.get(step), "title": step}
    found = step if isinstance(step, dict) else {}
    name, title = found.get("id"), found.get("title")
    # Files and folders of the engine have the names of steps.
    if not isinstance(name, str) or not STEP_ID.fullmatch(name) or not isinstance(title, str):
        raise values.error("needs", f"holds {short(step)}, which is no step", REBUILD)
    return PendingStep(name, title)


def listed_files(folder: Path) -> Collection[str]:
    """Return the paths within an engine folder that its manifest lists."""
    return _listed_files(_read_fields(folder)).keys()


def _listed_files(values: Fields) -> dict[str, dict[str, Any]]:
    """Return the `sha256` and `size_bytes` of each file, by its path within the folder."""
    listed = values.child("files")
    for name in listed.values:
        facts = listed.child(name)
        facts.text("sha256")
        facts.integer("size_bytes", low=0, high=1 << 50)
        if name.startswith("/") or ".." in name.split("/"):
            raise listed.error(short(name), "lies outside of the engine", REBUILD)
    return listed.values


def unlisted_files(folder: Path) -> list[str]:
    """Return the paths within an engine folder that its manifest doesn't list.

    They are the user's, such as a README.md; hidden and cache files are left out.
    """
    return sorted(_unlisted(folder, listed_files(folder)))


def _unlisted(folder: Path, listed: Collection[str]) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in _own_files(folder)}
    return names - set(listed) - {MANIFEST}


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield the files below `folder` but hidden ones (.git/, .cache/), caches and the system's."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            hidden = name.startswith(".") or name in SYSTEM_FILES
            if not hidden and path.suffix != CACHE_SUFFIX and path.is_file():
                yield path


def _check_names(folder: Path, expected: dict[str, dict[str, Any]]) -> None:
    """Raise VilaDeployError for a file that is missing, of another size, or not the engine's."""
    # In these a file counts by being there; beside them are a model card, notes and the like.
    engine_folders = {name.split("/")[0] for name in expected if "/" in name} | {TOKENIZER_FOLDER}
    for name in sorted(_unlisted(folder, expected)):
        if "/" in name and name.split("/")[0] in engine_folders:
            raise VilaDeployError(
                f"is not part of this engine ({MANIFEST} doesn't list it)",
                where=folder / name,
                fix="move it elsewhere",
            )
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file():
            raise VilaDeployError("is missing", where=path, fix=REBUILD)
        if path.stat().st_size != facts["size_bytes"]:
            raise VilaDeployError(
                f"has {path.stat().st_size} bytes, {MANIFEST} says {facts['size_bytes']}",
                where=path,
                fix=REBUILD,
            )


def _check_digests(
    folder: Path, expected: Mapping[str, dict[str, Any]], pool: ThreadPoolExecutor
) -> None:
    digests = pool.map(lambda name: sha256_file(folder / name), expected)
    for (name, facts), digest in zip(expected.items(), digests, strict=True):
        if digest != facts["sha256"]:
            raise VilaDeployError(
                f"was altered (SHA-256 {digest[:12]}…, {MANIFEST} says {facts['sha256'][:12]}…)",
                where=folder / name,
                fix=REBUILD,
            )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
