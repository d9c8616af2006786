"""What the tests of vila-quantize --resume share."""

import json
from pathlib import Path

import pytest

from tests.support.interruptions import interrupt_at
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize import layer_files as saved_layers
from vila_deploy.quantize import pipeline

SIZES = {"layers": 3, "hidden": 64, "intermediate": 128}
SCHEME = QuantScheme(64)
PARTIAL = "out.partial"
TEXT = "the king saw the red house on the hill.\n\n" * 8


def interrupted(root, out, options, **flags):
    """A run that Ctrl-C ends in its third layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_layers, "save_tensors", interrupt_at(saved_layers.save_tensors, 3))
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(root, out, options, **flags)
    assert len(layer_files(out.parent)) == 2


def contents(out):
    """Every file's bytes, without the time and the memory in the reports."""
    found = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    report = json.loads(found[Path("report.json")])
    assert report.pop("seconds") > 0
    assert report.pop("evaluation_seconds") >= 0
    assert report.pop("peak_resident_bytes") > report.pop("peak_memory_bytes") > 0
    found[Path("report.json")] = json.dumps(report)
    lines = found[Path("report.md")].decode().split("\n")
    found[Path("report.md")] = [line for line in lines if "of memory at the peak" not in line]
    assert len(found[Path("report.md")]) == len(lines) - 1
    return found


def layer_files(folder):
    return sorted((folder / PARTIAL).glob("layer-*.safetensors"))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
