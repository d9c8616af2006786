"""Files that are wrong: one line that names the file or tensor, and what to do."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.damage import (
    INDEX,
    LLM,
    PROJECTOR,
    Q_PROJ,
    TOWER,
    Damage,
    edit_bytes,
    edit_header,
    edit_json,
    edit_tensors,
    flip_last_bit,
    only_pickle,
    refused,
    remove,
    set_entry,
    write,
)
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.utils.errors import VilaDeployError

# (overrides of the checkpoint, damage, what the message must hold)
CASES: dict[str, tuple[dict[str, Any], Damage, str]] = {
    # Parts and files
    "no llm": ({}, remove("llm"), r"part llm/ is missing; download"),
    "no tower": ({}, remove("vision_tower"), r"part vision_tower/ is missing; download"),
    "no projector": ({}, remove("mm_projector"), r"part mm_projector/ is missing; download"),
    "no root config": ({}, remove("config.json"), r"config\.json: is missing; download"),
    "no weights": ({}, remove(TOWER), rf"{TOWER}: is missing.*; download"),
    "pickle only": (
        {},
        only_pickle("pytorch_model.bin"),
        rf"{LLM}: is missing.*pytorch_model\.bin is a pickle.*never read; convert it",
    ),
    "AWQ pickle": (
        {"shards": 2},
        only_pickle("vila-1.5-3b-w4-g128-awq.pt"),
        r"of-00002\.safetensors: is missing.*awq\.pt is a pickle.*; run vila-quantize",
    ),
    "AWQ release that is no archive": (
        {"shards": 2},
        only_pickle("vila-1.5-3b-w4-g128-awq-v2.pt"),
        r"awq-v2\.pt: is truncated, or not a zip archive.*; download",
    ),
    "LFS pointer": (
        {},
        write(LLM, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        rf"{LLM}: is a Git LFS pointer.*git lfs pull",
    ),
    "both layouts": (
        {"shards": 2},
        lambda root: save_file({"a": torch.ones(1)}, root / LLM),
        r"llm: holds both .*; remove the one",
    ),
    # Safetensors structure
    "pipe": (
        {},
        lambda root: ((root / LLM).unlink(), os.mkfifo(root / LLM)),
        rf"{LLM}: is no regular file; download",
    ),
    "empty": ({}, write(LLM, b""), rf"{LLM}: is truncated: 0 bytes; download"),
    "truncated data": (
        {},
        edit_bytes(LLM, lambda content: content[:-1]),
        rf"{LLM}: is truncated: \d+ bytes, .*; download",
    ),
    "truncated header": (
        {},
        edit_bytes(LLM, lambda content: content[:100]),
        rf"{LLM}: has an impossible header of \d+ bytes in 100 bytes; download",
    ),
    "oversized header": (
        {},
        edit_bytes(LLM, lambda content: b"\xff" * 8 + content[8:]),
        rf"{LLM}: has an impossible header of {2**64 - 1} bytes in \d+ bytes; download",
    ),
    "header larger than allowed": (
        {},
        lambda root: (root / LLM).write_bytes(
            (20 << 20).to_bytes(8, "little") + b"{" + b" " * (21 << 20)
        ),
        rf"{LLM}: has an impossible header of {20 << 20} bytes.*; download",
    ),
    "trailing bytes": (
        {},
        edit_bytes(LLM, lambda content: content + b"x"),
        rf"{LLM}: has bytes that belong to no tensor.*; download",
    ),
    "bit flip in the header": (
        {},
        edit_bytes(LLM, lambda content: content[:9] + b"\x80" + content[10:]),
        rf"{LLM}: header: is not valid JSON.*; download",
    ),
    "header is no object": (
        {},
        write(LLM, (2).to_bytes(8, "little") + b"[]"),
        rf"{LLM}: header: holds no JSON object; download",
    ),
    "name twice in the header": (
        {},
        edit_bytes(PROJECTOR, lambda content: content.replace(b"layers.1.w", b"layers.2.w")),
        rf"{PROJECTOR}: header: .*'layers\.2\.weight' occurs twice.*; download",
    ),
    "unknown dtype": (
        {},
        set_entry(PROJECTOR, "layers.1.bias", "dtype", "F13"),
        rf"{PROJECTOR}: tensor layers\.1\.bias: unknown dtype 'F13'; download",
    ),
    "negative shape": (
        {},
        set_entry(PROJECTOR, "layers.1.bias", "shape", [-256]),
        rf"{PROJECTOR}: tensor layers\.1\.bias: shape must be .*\[-256\]; download",
    ),
    "boolean shape": (
        {},
        set_entry(PROJECTOR, "layers.1.bias", "shape", [True, 256]),
        rf"{PROJECTOR}: tensor layers\.1\.bias: shape must be .*; download",
    ),
    "huge shape": (
        {},
        set_entry(PROJECTOR, "layers.1.bias", "shape", [2**62, 2**62]),
        rf"{PROJECTOR}: tensor layers\.1\.bias: shape must be .*; download",
    ),
    "shape against size": (
        {},
        set_entry(PROJECTOR, "layers.1.bias", "shape", [255]),
        rf"{PROJECTOR}: tensor layers\.1\.bias: 512 bytes don't hold F16 \[255\]; download",
    ),
    "overlap": (
        {},
        edit_header(
            PROJECTOR,
            lambda values: values["layers.1.weight"].update(
                data_offsets=values["layers.1.bias"]["data_offsets"]
            ),
        ),
        rf"{PROJECTOR}: tensor layers\.1\.\S+ at byte 0 overlaps.*; download",
    ),
    "gap": (
        {},
        edit_header(PROJECTOR, lambda values: values.pop("layers.1.bias")),
        rf"{PROJECTOR}: tensor \S+ at byte \d+ leaves a gap; download",
    ),
    # The index
    "shard missing": (
        {"shards": 2},
        remove("llm/model-00002-of-00002.safetensors"),
        r"model-00002-of-00002\.safetensors: is missing, but .*index\.json names it; download",
    ),
    "tensor missing from the index": (
        {"shards": 2},
        edit_json(INDEX, lambda values: values["weight_map"].pop("lm_head.weight")),
        rf"{INDEX}: lm_head\.weight: lies in model-00002.*the index says None; download",
    ),
    "shard missing from the index": (
        {"shards": 2},
        edit_json(
            INDEX,
            lambda values: values.update(
                weight_map={k: v for k, v in values["weight_map"].items() if "-00001-of" in v}
            ),
        ),
        r"llm: tensor \S+ is missing; download",
    ),
    "index maps to the wrong shard": (
        {"shards": 2},
        edit_json(
            INDEX,
            lambda values: values["weight_map"].update(
                {"lm_head.weight": "model-00001-of-00002.safetensors"}
            ),
        ),
        rf"{INDEX}: lm_head\.weight: lies in .*; download",
    ),
    "index names a tensor that is nowhere": (
        {"shards": 2},
        edit_json(
            INDEX,
            lambda values: values["weight_map"].update(
                {"ghost": "model-00001-of-00002.safetensors"}
            ),
        ),
        r"model-00001-of-00002\.safetensors: tensor ghost is not in it.*; download",
    ),
    **{
        f"index leads to {file!r}": (
            {"shards": 2},
            edit_json(INDEX, lambda v, file=file: v["weight_map"].update({"lm_head.weight": file})),
            rf"{INDEX}: weight_map\.lm_head\.weight: must be the name of a \.safetensors file"
            r".*; download",
        )
        for file in (
            "../vision_tower/model.safetensors",
            "/etc/model.safetensors",
            "..\\model.safetensors",
            "C:model.safetensors",
            "a\0.safetensors",
            "pytorch_model.bin",
            "",
            None,
            7,
        )
    },
    "index without a map": (
        {"shards": 2},
        write(INDEX, b"{}"),
        rf"{INDEX}: weight_map: must be an object.*; download",
    ),
    # Checksums
    "bit flip in the weights": (
        {"checksums": True},
        edit_bytes(PROJECTOR, flip_last_bit),
        rf"{PROJECTOR}: content has changed.*; download",
    ),
    "NaN under checksums": (
        {"checksums": True},
        edit_bytes(PROJECTOR, lambda content: content[:-2] + b"\x00\x7e"),
        rf"{PROJECTOR}: tensor \S+ holds NaN or Inf; download",
    ),
    "checksum line that leaves the folder": (
        {},
        write("SHA256SUMS", b"0" * 64 + b"  ../model.safetensors\n"),
        r"SHA256SUMS: line 1: must be .*; download",
    ),
    "absolute checksum line": (
        {},
        write("SHA256SUMS", b"0" * 64 + b"  /etc/model.safetensors\n"),
        r"SHA256SUMS: line 1: must be .*; download",
    ),
    "checksums that are none": (
        {},
        write("SHA256SUMS", b"\x00\xff rubbish"),
        r"SHA256SUMS: line 1: must be .*; download",
    ),
    "file without a checksum": (
        {"checksums": True},
        edit_bytes("SHA256SUMS", lambda content: content.split(b"\n", 1)[1]),
        r"SHA256SUMS: does not list llm/model\.safetensors; download",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_open_refuses(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, damage, message = CASES[case]
    root = make_checkpoint(tmp_path / "c", **overrides)
    damage(root)
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(root))
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, b"\x00\x7e"), (torch.float16, b"\x00\xfc"), (torch.bfloat16, b"\x80\x7f")],
    ids=["fp16 NaN", "fp16 -Inf", "bf16 Inf"],
)
@pytest.mark.parametrize("position", [0, 12_345, -1])
def test_non_finite_is_found_on_reading(
    dtype: torch.dtype, value: bytes, position: int, tmp_path: Path
) -> None:
    root = make_checkpoint(tmp_path / "c", dtype=dtype)
    content = bytearray((root / LLM).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    name = "model.layers.1.mlp.up_proj.weight"
    begin, stop = json.loads(content[8:end])[name]["data_offsets"]
    at = end + (begin if position >= 0 else stop) + 2 * position
    content[at : at + 2] = value
    (root / LLM).write_bytes(content)
    llm = open_checkpoint(root).llm
    assert llm.tensor("model.layers.0.mlp.up_proj.weight").isfinite().all()
    for read in (lambda: llm.tensor(name), lambda: llm.linear(name.removesuffix(".weight"))):
        with pytest.raises(VilaDeployError, match=rf"{LLM}: tensor {name} holds NaN or Inf; down"):
            read()


def test_non_finite_scale_is_found_on_reading(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True)
    edit_tensors(LLM, lambda tensors: tensors[f"{Q_PROJ}.scales"].fill_(torch.inf))(root)
    llm = open_checkpoint(root).llm
    with pytest.raises(VilaDeployError, match=rf"{LLM}: tensor {Q_PROJ}\.scales holds NaN or Inf"):
        llm.linear(Q_PROJ)


@pytest.mark.parametrize("content", [{"x": torch.ones(1)}, {"layers.1.bias": torch.ones(3)}])
def test_file_that_changes_after_opening(content: dict, tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    checkpoint = open_checkpoint(root)
    save_file(content, root / PROJECTOR)
    with pytest.raises(VilaDeployError, match=rf"{PROJECTOR}: tensor layers\.1\.bias .*; download"):
        checkpoint.projector.tensor("layers.1.bias")


@pytest.mark.parametrize("name", ["nothing", "a\nb\x1b[31m", "x" * 5000, "nul\0"])
def test_no_such_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match="no such folder; give"):
        open_checkpoint(tmp_path / name)


def test_unreadable_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system while reading is one line too."""
    root = make_checkpoint(tmp_path / "c", checksums=True)

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("vila_deploy.checkpoint.checksums.sha256_file", broken)
    with pytest.raises(VilaDeployError, match=rf"{LLM}: cannot be read \(Input/output error\); ch"):
        open_checkpoint(root)
