"""manifest.json: what is in an engine folder, checked byte for byte when it is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json, read_json_object, replace_file, sha256_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "manifest_sha256"
# What backends keep to be quicker next time; it changes from run to run and may be deleted.
CACHE_SUFFIX = ".cache"
HASH_THREADS = 4
REBUILD = "build the engine again with vila-build-engine, or copy it again"


@dataclass(frozen=True)
class Limits:
    """Largest batch, longest prompt and longest prompt with answer, in tokens."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int


@dataclass(frozen=True)
class Manifest:
    """Everything about an engine but its weights.

    Args:
        name: what tables call the model.
        weights: "trained" or "random".
        weight_bytes_per_token: bytes of weights that one decoding step reads.
        checkpoint_fingerprint: of the checkpoint that it was built from; None for random weights.
        versions: of the tools that built it; the backend checks what must match.
        needs: steps that are still to be done on the device; empty when the engine is complete.
        module_precision: what vision tower, output head and key/value cache are kept in.
        effect: what that changes in the logits, where it was measured (see Effect.to_json).
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
    needs: tuple[str, ...] = ()
    module_precision: ModulePrecision = ALL_FP16
    effect: Mapping[str, Any] | None = None


def write_manifest(folder: Path, manifest: Manifest, without: Collection[str] = ()) -> None:
    """Writes manifest.json with size and SHA-256 of every other file below `folder`.

    One that is there is replaced at once.

    Args:
        without: paths within `folder` that are about to be removed.
    """
    partial = folder / f".{MANIFEST}.partial"
    left_out = {folder / MANIFEST, partial, *(folder / path for path in without)}
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in left_out and path.suffix != CACHE_SUFFIX
    ]
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        digests = threads.map(sha256_file, paths)
    values = {field.name: getattr(manifest, field.name) for field in fields(Manifest)}
    del values["module_precision"]
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "components": manifest.module_precision.to_json(),
        **values,
        "limits": vars(manifest.limits),
        "model": manifest.model.to_json(),
        "files": {
            path.relative_to(folder).as_posix(): {
                "sha256": digest,
                "size_bytes": path.stat().st_size,
            }
            for path, digest in zip(paths, digests, strict=True)
        },
    }
    content[CHECKSUM] = _digest(content)
    partial.write_text(canonical_json(content), "utf-8")
    replace_file(partial, folder / MANIFEST)


def load_manifest(folder: Path) -> Manifest:
    """Reads manifest.json and checks every file of the engine against it.

    Raises:
        VilaDeployError: no engine, another format version, or any byte that differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise VilaDeployError(
            f"holds no {MANIFEST}", where=folder, fix="give a folder that vila-build-engine made"
        )
    content = read_json_object(path)
    found = Fields(content, path)
    version = found.integer("format_version", low=0)
    if version != FORMAT_VERSION:
        raise VilaDeployError(
            f"has format version {version}, this vila-deploy reads {FORMAT_VERSION}",
            where=path,
            fix="build the engine again with this version",
        )
    checksum = content.pop(CHECKSUM, None)
    whole = canonical_json({**content, CHECKSUM: checksum})
    # Comparing the text itself finds changes that parsing forgives, such as white space.
    if checksum != _digest(content) or path.read_text("utf-8") != whole:
        raise VilaDeployError("was altered", where=path, fix=REBUILD)
    _check_files(folder, content["files"])
    return _from_fields(found)


def _from_fields(found: Fields) -> Manifest:
    limits = found.child("limits")
    return Manifest(
        name=found.text("name"),
        target=found.text("target"),
        backend=found.text("backend"),
        precision=found.text("precision"),
        weights=found.text("weights"),
        weight_bytes_per_token=found.integer("weight_bytes_per_token", high=1 << 50),
        checkpoint_fingerprint=found.values["checkpoint_fingerprint"],
        limits=Limits(
            *(limits.integer(key) for key in ("max_batch_size", "max_input_len", "max_seq_len"))
        ),
        model=ModelInfo.from_fields(found.child("model")),
        versions=found.child("versions").values,
        needs=tuple(found.values["needs"]),
        module_precision=ModulePrecision.from_fields(found),
        effect=found.child("effect").values if "effect" in found else None,
    )


def _check_files(folder: Path, expected: dict[str, dict[str, Any]]) -> None:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != CACHE_SUFFIX)
    present = {path.relative_to(folder).as_posix() for path in files}
    for name in sorted(present - expected.keys() - {MANIFEST}):
        raise VilaDeployError(
            f"is not part of this engine ({MANIFEST} doesn't list it)",
            where=folder / name,
            fix="move it elsewhere",
        )
    for name, facts in expected.items():
        path = folder / name
        if name not in present:
            raise VilaDeployError("is missing", where=path, fix=REBUILD)
        if path.stat().st_size != facts["size_bytes"]:
            raise VilaDeployError(
                f"has {path.stat().st_size} bytes, {MANIFEST} says {facts['size_bytes']}",
                where=path,
                fix=REBUILD,
            )
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        digests = pool.map(lambda name: sha256_file(folder / name), expected)
        for (name, facts), digest in zip(expected.items(), digests, strict=True):
            if digest != facts["sha256"]:
                raise VilaDeployError(
                    f"was altered (SHA-256 {digest[:12]}…, {MANIFEST} says "
                    f"{facts['sha256'][:12]}…)",
                    where=folder / name,
                    fix=REBUILD,
                )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
