"""Checkpoints whose llm/ is one TinyChat *-v2.pt, as the AWQ releases of VILA have it."""

from __future__ import annotations

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.support.commands import invoke, succeed
from tests.support.damage import INDEX, Q_PROJ, edit_json, refused
from tests.support.tiny import make_checkpoint
from tests.support.tinychat_release import (
    NAME,
    PT,
    SEARCH_RESULT,
    as_bfloat16,
    change,
    release,
)
from vila_deploy.builder.plan import plan_build
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.cli.build_engine import main as build_engine_command
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.runtime.open_engine import open_engine

TOKENS = [1, 72, 101, 108, 108, 111, 300, 45]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (NAME, {}),
        ("llama-3-vila1.5-8b-fix-w4-g32-awq-v2.pt", {"group_size": 32, "kv_heads": 2}),
        ("NVILA-8B-w4-g128-awq-v2.pt", {"group_size": 128, "qwen2": True}),
        ("no-size-v2.pt", {"group_size": 32, "tied": True}),
        ("no-size-v2.pt", {"group_size": 128, "intermediate": 1152}),
    ],
)
def test_holds_what_the_same_weights_hold_elsewhere(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    root, awq = release(tmp_path, name, **fields)
    found, expected = open_checkpoint(root), open_checkpoint(awq)
    quantization = found.config.llm.quantization
    assert quantization is not None
    assert quantization.group_size == fields.get("group_size", 64)
    assert (quantization.quant_method, quantization.version) == ("awq", "tinychat-v2")
    assert found.llm.files() == [root / "llm" / name]
    for key in expected.llm.names():
        if key.endswith((".weight", ".bias")):
            assert torch.equal(found.llm.tensor(key), expected.llm.tensor(key))
        elif key.endswith(".qweight"):
            one, other = (c.llm.linear(key.removesuffix(".qweight")) for c in (found, expected))
            assert isinstance(one, QuantizedLinear)
            assert isinstance(other, QuantizedLinear)
            assert all(
                torch.equal(getattr(one, n), getattr(other, n)) for n in ("q", "scale", "zero")
            )
    # The same values, scales and zero points: not one bit of the logits differs.
    one, other = (ReferenceSession(checkpoint) for checkpoint in (found, expected))
    np.testing.assert_array_equal(
        one.prefill(one.embed_tokens(TOKENS)), other.prefill(other.embed_tokens(TOKENS))
    )


def test_biases_come_with_their_linears(tmp_path: Path) -> None:
    llm = open_checkpoint(release(tmp_path, qwen2=True)[0]).llm
    linear = llm.linear(Q_PROJ)
    assert isinstance(linear, QuantizedLinear)
    assert linear.bias is not None
    assert torch.equal(linear.bias, llm.tensor(f"{Q_PROJ}.bias"))


def test_parameters_are_tensors_too(tmp_path: Path) -> None:
    """A state_dict holds tensors, a dictionary made by hand may hold a module's parameters."""
    root, awq = release(tmp_path)
    change(lambda s: s.update({"lm_head.weight": torch.nn.Parameter(s["lm_head.weight"])}))(root)
    found, expected = (open_checkpoint(r).llm.tensor("lm_head.weight") for r in (root, awq))
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_builds_an_engine(tmp_path: Path) -> None:
    """It says what the reference says, and planning it needs the name of the file alone."""
    root, _ = release(tmp_path)
    out = tmp_path / "engine"
    arguments = [str(root), "--target", "cpu", "-o", str(out), "--max-seq-len", "64"]
    # One int8 term, an int8 head and tower round what the reference doesn't.
    arguments += ["--activations", "int8x2", "--lm-head", "fp16", "--vision", "fp16"]
    result = CliRunner().invoke(build_engine_command, arguments)
    assert result.exit_code == 0, result.output
    assert "int4 engine for cpu" in result.output
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["checkpoint_fingerprint"] == open_checkpoint(root).fingerprint()
    reference = ReferenceSession(open_checkpoint(root))
    with open_engine(out) as opened:
        found = opened.session.prefill(0, opened.session.embed_tokens(TOKENS))
    expected = reference.prefill(reference.embed_tokens(TOKENS))
    # Two int8 terms of the activations differ by that much: see test_onnxruntime.
    assert np.abs(found - expected).max() < 1e-3 * expected.std()
    (root / PT).write_bytes(b"")
    assert plan_build(resolve_build(root, BuildOptions("cpu"), planning=True)).precision == "int4"


def test_safetensors_win(tmp_path: Path) -> None:
    """Also an incomplete set of them, which a half-done download leaves."""
    root, awq = release(tmp_path)
    shards = make_checkpoint(tmp_path / "shards", shards=2)
    for file in (shards / "llm").glob("model*"):
        shutil.copyfile(file, root / "llm" / file.name)
    assert open_checkpoint(root).config.llm.quantization is None
    assert isinstance(open_checkpoint(root).llm.linear(Q_PROJ), torch.Tensor)
    (root / "llm/model-00002-of-00002.safetensors").unlink()
    assert re.search(r"00002-of-.* is missing, .*-v2\.pt is read only where.*; down", refused(root))
    shutil.copyfile(root / PT, awq / PT)
    assert open_checkpoint(awq).llm.files() == [awq / "llm/model.safetensors"]


def test_bfloat16_files_are_read(tmp_path: Path) -> None:
    """As llm-awq writes them with --dtype bfloat16: the same integers, scales rounded to 8 bits."""
    root, awq = release(tmp_path)
    change(as_bfloat16)(root)
    found, expected = open_checkpoint(root).llm, open_checkpoint(awq).llm
    one, other = found.linear(Q_PROJ), expected.linear(Q_PROJ)
    assert isinstance(one, QuantizedLinear)
    assert isinstance(other, QuantizedLinear)
    assert torch.equal(one.q, other.q)
    assert torch.equal(one.zero, other.zero)
    assert torch.equal(one.scale, other.scale.bfloat16().half())
    norm = "model.norm.weight"
    assert torch.equal(found.tensor(norm).float(), expected.tensor(norm).bfloat16().float())


@pytest.mark.parametrize("where", ["llm", "."])
def test_a_file_beside_the_shards_is_said_and_can_be_chosen(where: str, tmp_path: Path) -> None:
    """NVILA-AWQ's repository holds only the file; people put it beside NVILA-8B's shards."""
    root, _ = release(tmp_path)
    shutil.move(root / PT, root / where / NAME)
    (root / INDEX).unlink()
    shards = make_checkpoint(tmp_path / "shards")
    shutil.copyfile(shards / "llm/model.safetensors", root / "llm/model.safetensors")
    done = invoke("vila-build-engine", root, "--target", "cpu", "--plan")
    assert done.returncode == 0
    (line,) = (line for line in done.stderr.splitlines() if NAME in line)
    assert f'write "weights_file": "{NAME}" into llm/config.json' in line
    assert ("move it into llm/" in line) == (where == ".")
    assert open_checkpoint(root).config.llm.quantization is None
    shutil.move(root / where / NAME, root / PT)
    edit_json("llm/config.json", lambda values: values.update(weights_file=NAME))(root)
    assert open_checkpoint(root).llm.files() == [root / PT]
    assert NAME not in invoke("vila-build-engine", root, "--target", "cpu", "--plan").stderr
    succeed("vila-convert", root, "--to", "awq", "-o", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").llm.files() != [root / PT]


@pytest.mark.parametrize("name", ["../llm/" + NAME, "none-v2.pt", "model.safetensors", 3, ""])
def test_a_chosen_file_must_be_there(name: Any, tmp_path: Path) -> None:
    root, _ = release(tmp_path)
    edit_json("llm/config.json", lambda values: values.update(weights_file=name))(root)
    assert re.search(r"llm/config\.json: weights_file: ", refused(root))


def test_fingerprint_and_checksums_cover_it(tmp_path: Path) -> None:
    root, _ = release(tmp_path)
    before = open_checkpoint(root).fingerprint()
    content = bytearray((root / PT).read_bytes())
    at = content.index(open_checkpoint(root).llm.tensor("model.norm.weight").numpy().tobytes())
    files = [PT, "vision_tower/model.safetensors", "mm_projector/model.safetensors"]
    lines = [f"{sha256((root / file).read_bytes()).hexdigest()}  {file}\n" for file in files]
    (root / "SHA256SUMS").write_text("".join(lines))
    assert open_checkpoint(root).fingerprint() == before
    content[at] ^= 1
    (root / PT).write_bytes(content)
    assert re.search(rf"{PT}: content has changed: SHA-256 .*; download", refused(root))
    (root / "SHA256SUMS").unlink()
    assert open_checkpoint(root).fingerprint() != before


def test_tower_is_never_read_from_a_pickle(tmp_path: Path) -> None:
    root, _ = release(tmp_path)
    tower = root / "vision_tower/model.safetensors"
    torch.save(load_file(tower), root / "vision_tower/tower-v2.pt")
    tower.unlink()
    assert re.search(r"vision_tower/model\.safetensors: is missing", refused(root))


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    root, _ = release(tmp_path)
    llm = open_checkpoint(root).llm
    start = llm.tensor("model.embed_tokens.weight").data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("mappings are listed in /proc on Linux only")
    for line in maps.read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= start < high:
            assert line.endswith(NAME)
            return
    pytest.fail("the tensor lies in no mapping")


def test_load_config_alone_reads_no_weights(tmp_path: Path) -> None:
    root, _ = release(tmp_path)
    (root / PT).write_bytes(b"")
    quantization = load_config(root).llm.quantization
    assert quantization is not None
    assert quantization.group_size == 64


def test_files_beside_it_do_not_disturb(tmp_path: Path) -> None:
    """A release of NVILA has the tower's activation scales beside the model."""
    root, _ = release(tmp_path)
    torch.save({"vision_tower": torch.ones(4)}, root / "llm/NVILA-8B-VT-smooth-scale.pt")
    torch.save(SEARCH_RESULT, root / "llm/NVILA-8B-w4-g128-awq.pt")
    assert open_checkpoint(root).llm.files() == [root / PT]
