"""Engine folders of manifest format version 1: manifests that commit 500db21 wrote.

The manifests are as they were but for the hashes of the files, which are stand-ins here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from tests.support.paths import GOLDEN

MANIFESTS = GOLDEN / "manifests"


def old_engine(folder: Path, name: str) -> Path:
    """An engine folder with the manifest called `name`, and a stand-in for each of its files."""
    content = json.loads((MANIFESTS / f"version-1-{name}.json").read_text("utf-8"))
    for path in content["files"]:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "tensorrt.json":
            shutil.copyfile(MANIFESTS / "version-1-tensorrt.json", file)
        else:
            file.write_text(path)
        data = file.read_bytes()
        content["files"][path] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "size_bytes": len(data),
        }
    del content["manifest_sha256"]
    text = json.dumps(content, sort_keys=True)
    content["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(text, "utf-8")
    return folder
