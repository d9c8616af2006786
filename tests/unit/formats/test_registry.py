"""The table of formats: what each row promises, and a new row used through the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.commands import invoke, succeed
from tests.support.made_up_format import ROW
from tests.support.paths import TINY_VILA
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.checksums import CHECKSUM_FILE
from vila_deploy.formats.base import QuantizationConfig, QuantizedLinear, QuantScheme, TensorSpec
from vila_deploy.formats.registry import FORMATS, format_of
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.writers.folder import Writer

IMAGE = next(iter(sorted((TINY_VILA.parent / "pictures").glob("*.png"))))
DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.int8: "I8", torch.int16: "I16"}
DTYPES |= {torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}


def random_linear(rows: int = 64, columns: int = 256, bits: int = 4) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(1)
    groups = (rows, columns // 64)
    return QuantizedLinear(
        q=torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        scale=torch.rand(groups, generator=generator).half() + 0.01,
        zero=torch.full(groups, 2 ** (bits - 1), dtype=torch.uint8),
        bits=bits,
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("zero_point", [True, False])
def test_specs_are_those_of_the_packed_tensors(name: str, zero_point: bool) -> None:
    packing, linear = FORMATS[name].packing, random_linear()
    tensors = packing.pack(linear, zero_point)
    found = {key: ((DTYPES[t.dtype],), tuple(t.shape)) for key, t in tensors.items()}
    specs = {spec.name: spec for spec in packing.tensor_specs(64, 256, 64, 4, zero_point)}
    assert found.keys() == specs.keys() <= set(packing.tensors)
    for key, ((dtype,), shape) in found.items():
        assert dtype in specs[key].dtypes
        assert shape == specs[key].shape
    assert packing.marker in found
    back = packing.unpack(tensors, 64)
    assert all(torch.equal(getattr(back, f), getattr(linear, f)) for f in ("q", "scale", "zero"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_names_what_exists(name: str) -> None:
    row = FORMATS[name]
    assert issubclass(row.writer, Writer)
    assert row.reader is None or callable(row.reader)
    scheme = QuantScheme(64, symmetric=True)
    config = QuantizationConfig("", 4, 64, zero_point=False, version=row.packing.version)
    assert config.scheme == scheme
    assert format_of(config).packing is row.packing


@pytest.mark.parametrize("name", FORMATS)
def test_other_bits_are_refused(name: str) -> None:
    packing = FORMATS[name].packing
    with pytest.raises(VilaDeployError, match=r"holds 4-bit .*values, found 3 bits"):
        packing.check(QuantScheme(128, symmetric=True, bits=3), {"x": (64, 256)})
    with pytest.raises(VilaDeployError, match=r"holds 4-bit .*values, found 3 bits"):
        packing.pack(random_linear(bits=3), zero_point=True)


def test_reading_configs_needs_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from vila_deploy.checkpoint.config import load_config\n"
        "from vila_deploy.formats.registry import FORMATS\n"
        "packings = [row.packing for row in FORMATS.values()]\n"
        f"load_config(Path({str(TINY_VILA)!r}))\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_made_up_format_works_in_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantize into it, convert to and from it, build from it: tokens are those of awq."""
    monkeypatch.setitem(FORMATS, "made-up", ROW)
    both = tmp_path / "both"
    done = invoke(
        "vila-quantize", TINY_VILA, "-o", both, "--algorithm", "rtn", "--group-size", 64,
        "--format", "awq,made-up", "--no-eval",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: nobody reads made-up" in done.stderr
    config = json.loads((both / "made-up" / "llm" / "config.json").read_text("utf-8"))
    assert config["quantization_config"] == {"quant_method": "made-up", "group": 64}
    succeed("vila-convert", both / "awq", "--to", "made-up", "-o", tmp_path / "to")
    succeed("vila-convert", tmp_path / "to", "--to", "awq", "-o", tmp_path / "from")
    for first, second in ((both / "made-up", tmp_path / "to"), (both / "awq", tmp_path / "from")):
        digests = [(root / CHECKSUM_FILE).read_text("utf-8") for root in (first, second)]
        assert digests[0] == digests[1]
    answers = []
    for name in ("awq", "made-up"):
        engine = tmp_path / f"engine-{name}"
        succeed("vila-build-engine", both / name, "--target", "cpu", "-o", engine)
        answer = succeed(
            "vila-chat", engine, "--image", IMAGE, "-p", "What is in the picture?", "--json"
        )
        answers.append(json.loads(answer)["tokens"])
    assert answers[0] == answers[1]
    assert len(answers[0]) > 2
    quantized = open_checkpoint(both / "made-up").config.llm.quantization
    assert quantized == QuantizationConfig("made-up", 4, 64, True, "made-up-v1")


def test_a_made_up_checkpoint_is_checked_against_its_specs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "made-up", ROW)
    out = tmp_path / "out"
    succeed(
        "vila-quantize", TINY_VILA, "-o", out, "--algorithm", "rtn", "--group-size", 64,
        "--format", "made-up", "--no-eval",
    )  # fmt: skip
    rows = iter((TensorSpec("codes", (1, 1), ("I16",)),))
    monkeypatch.setattr(type(ROW.packing), "tensor_specs", lambda self, *sizes: rows)
    with pytest.raises(VilaDeployError, match=r"q_proj\.codes is .* config.json asks for \[1, 1\]"):
        open_checkpoint(out)
