"""Checkpoints that are right: what they say, what their tensors hold, what identifies them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import Tiny, llm_tensors, make_checkpoint, projector_tensors, tower_tensors
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.utils.errors import VilaDeployError


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"kv_heads": 2, "shards": 3},
        {"dtype": torch.bfloat16, "unused_tower": False},
        {"dtype": torch.float32, "tied": True, "layers": 3, "checksums": True},
    ],
    ids=["plain", "gqa-sharded", "bf16", "fp32-tied-checksums"],
)
def test_every_tensor_as_written(overrides: dict, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", **overrides))
    tiny = Tiny(**overrides)
    generator = torch.Generator().manual_seed(tiny.seed)
    for reader, make in (
        (checkpoint.llm, llm_tensors),
        (checkpoint.vision, tower_tensors),
        (checkpoint.projector, projector_tensors),
    ):
        written = make(tiny, generator)
        assert reader.names() == sorted(written)
        for name, tensor in written.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) == tensor.dtype
            assert torch.equal(reader.tensor(name), tensor), name


def test_bytes_as_the_format_says(tmp_path: Path) -> None:
    """Against the file itself, read with numpy alone."""
    root = make_checkpoint(tmp_path / "c")
    content = (root / "llm/model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:end])["model.layers.1.mlp.down_proj.weight"]
    begin, stop = entry["data_offsets"]
    expected = np.frombuffer(content[end + begin : end + stop], "<f2").reshape(entry["shape"])
    found = open_checkpoint(root).llm.linear("model.layers.1.mlp.down_proj")
    assert isinstance(found, torch.Tensor)
    assert np.array_equal(found.numpy(), expected)


def test_unaligned_tensor_is_copied(tmp_path: Path) -> None:
    """The format allows a header of any length; older writers did not pad it."""
    root = make_checkpoint(tmp_path / "c", dtype=torch.float32)
    path = root / "mm_projector/model.safetensors"
    before = open_checkpoint(root).projector.tensor("layers.2.weight").clone()
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    after = open_checkpoint(root).projector.tensor("layers.2.weight")
    assert after.data_ptr() % after.element_size() == 0
    assert torch.equal(after, before)


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    llm = open_checkpoint(make_checkpoint(tmp_path / "c", tied=True)).llm
    assert "lm_head.weight" in llm
    assert "lm_head.weight" not in llm.names()
    assert torch.equal(llm.tensor("lm_head.weight"), llm.tensor("model.embed_tokens.weight"))
    assert llm.linear("lm_head").shape == (384, 128)


def test_four_bit_linear(tmp_path: Path) -> None:
    """Each weight within half a step of what was quantized, except where fp16 rounded the scale."""
    tiny = Tiny(quantized=True, kv_heads=2)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True, kv_heads=2))
    weights = llm_tensors(tiny, torch.Generator().manual_seed(tiny.seed))
    assert checkpoint.config.llm.quantization is not None
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        linear = checkpoint.llm.linear(f"model.layers.1.{name}")
        assert isinstance(linear, QuantizedLinear)
        assert linear.group_size == tiny.group_size
        weight = weights[f"model.layers.1.{name}.weight"].float()
        step = linear.scale.float().repeat_interleave(tiny.group_size, 1)
        assert ((linear.dequantize() - weight).abs() <= 0.51 * step).all()
    assert isinstance(checkpoint.llm.linear("lm_head"), torch.Tensor)


def test_unused_tower_layers_may_be_absent(tmp_path: Path) -> None:
    """Select layer -2 of 3 layers uses 2; config.json still says 3."""
    changes = {"unused_tower": False, "vision_layers": 2}
    root = make_checkpoint(tmp_path / "c", **changes, vision_config={"num_hidden_layers": 3})
    checkpoint = open_checkpoint(root)
    assert checkpoint.config.vision_layers_used == 2
    with pytest.raises(VilaDeployError, match="no such tensor"):
        checkpoint.vision.tensor("vision_model.encoder.layers.2.mlp.fc1.weight")


def test_symlinked_weights_open(tmp_path: Path) -> None:
    """The cache of huggingface_hub holds links to blobs whose names say nothing."""
    root = make_checkpoint(tmp_path / "c", shards=2)
    for number, path in enumerate(sorted(root.rglob("*.safetensors"))):
        path.rename(tmp_path / f"blob{number}")
        path.symlink_to(tmp_path / f"blob{number}")
    checkpoint = open_checkpoint(root)
    assert checkpoint.llm.tensor("model.norm.weight").shape == (128,)


def test_fingerprint_is_content_alone(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "one")
    other = shutil.copytree(root, tmp_path / "other", copy_function=shutil.copyfile)
    os.utime(other / "config.json", (1, 1))
    fingerprint = open_checkpoint(root).fingerprint()
    assert len(fingerprint) == 64
    assert open_checkpoint(other).fingerprint() == fingerprint
    write_checksums(other)
    assert open_checkpoint(other).fingerprint() == fingerprint


@pytest.mark.parametrize(
    "file",
    ["config.json", "llm/config.json", "llm/tokenizer.json", "mm_projector/model.safetensors"],
)
def test_fingerprint_sees_every_file(file: str, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    before = open_checkpoint(root).fingerprint()
    content = bytearray((root / file).read_bytes())
    if file.endswith(".json"):
        content += b"\n"
    else:
        content[-2] ^= 1  # the lowest bit of the last fp16 value
    (root / file).write_bytes(content)
    assert open_checkpoint(root).fingerprint() != before


def test_written_checksums_are_sha256sums(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", shards=2)
    write_checksums(root)
    lines = (root / "SHA256SUMS").read_text("utf-8").splitlines()
    assert len(lines) == 4
    for line in lines:
        digest, path = line.split("  ")
        assert hashlib.sha256((root / path).read_bytes()).hexdigest() == digest
    open_checkpoint(root)


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    """Chat and --help import this package; torch would cost them seconds."""
    root = make_checkpoint(tmp_path / "c", quantized=True, checksums=True)
    code = (
        "import sys, pathlib; from vila_deploy.checkpoint import open_checkpoint;"
        "c = open_checkpoint(pathlib.Path(sys.argv[1])); c.fingerprint();"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, root], check=True)
