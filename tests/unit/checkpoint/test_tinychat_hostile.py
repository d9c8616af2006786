"""TinyChat *-v2.pt files that are wrong or hostile: one line each, and nothing of them runs."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.damage import Q_PROJ, refused, set_key
from tests.support.tinychat_release import PT, SEARCH_RESULT, Tensors, change, release, save
from vila_deploy.checkpoint import open_checkpoint, torch_load
from vila_deploy.utils.errors import VilaDeployError


class Call:
    """Pickled, it asks for os.mkdir("unpickled") to be called by whoever loads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


class Allocate:
    """A call that torch's own unpickler for weights allows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 40,)


def pickle_with(value: Any, protocol: int) -> Callable[[Path], None]:
    """`value` in place of data.pkl, which torch.save would write in protocol 2."""

    def damage(root: Path) -> None:
        with zipfile.ZipFile(root / PT) as old:
            entries = {entry.filename: old.read(entry) for entry in old.infolist()}
        name = next(name for name in entries if name.endswith("data.pkl"))
        entries[name] = pickle.dumps(value, protocol)
        with zipfile.ZipFile(root / PT, "w") as new:
            for entry, content in entries.items():
                new.writestr(entry, content)

    return damage


def compress(root: Path) -> None:
    with zipfile.ZipFile(root / PT) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(root / PT, "w", zipfile.ZIP_DEFLATED) as new:
        for entry, content in entries.items():
            new.writestr(entry, content)


def set_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda root: (root / PT).write_bytes(edit((root / PT).read_bytes()))


def first_layout(state: Tensors) -> None:
    for name in [name for name in state if name.endswith(".scaled_zeros")]:
        state[name.replace("scaled_zeros", "qzeros")] = state.pop(name).short()


UP = "model.layers.1.mlp.up_proj"
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (save({"a": Call()}), r"wants to call 'posix\.mkdir', which could run .*; get it"),
    "code in a layout of its own": (
        pickle_with(Call(), 4),
        r"is in pickle protocol 4, must be in 2; down",
    ),
    "code with a bare name": (pickle_with(Call(), 2), r"wants to call 'posix\.mkdir'"),
    "memory": (save({"a": Allocate()}), r"wants to call '.*\.bytearray', which could .*; get it"),
    "bare pickle": (
        lambda root: (root / PT).write_bytes(pickle.dumps(Call(), 2)),
        r"is truncated, or not a zip archive as torch\.save writes it.*; download",
    ),
    "truncated": (set_bytes(lambda content: content[:-200]), r"is truncated, or not a zip.*; down"),
    "truncated to nothing": (set_bytes(lambda content: b""), r"is truncated, or not a zip.*; down"),
    "hole": (
        set_bytes(lambda content: content.replace(b"PK\3\4", b"\0\0\0\0", 1)),
        r"is truncated, or not a zip archive",
    ),
    "compressed": (compress, r"is a compressed archive, which torch\.save never writes; down"),
    "LFS pointer": (
        set_bytes(lambda _: b"version https://git-lfs.github.com/spec/v1\n"),
        r"is a Git LFS pointer, .*; run 'git lfs pull'",
    ),
    "pipe": (
        lambda root: ((root / PT).unlink(), os.mkfifo(root / PT)),
        r"is no regular file; download",
    ),
    "dangling link": (
        lambda root: ((root / PT).unlink(), (root / PT).symlink_to("nowhere")),
        r"is missing; download",
    ),
    "no dictionary": (save([torch.ones(1)]), r"holds a list, must hold tensors by name; download"),
    "empty": (save({}), r"holds no tensors; download"),
    "number": (change(lambda s: s.update(step=3)), r"holds int under 'step', .* only; use"),
    "number as a name": (change(lambda s: s.update({3: torch.ones(1)})), r"named 3, must be text"),
    "nested": (lambda r: save({"model": torch.load(r / PT)})(r), r"holds OrderedDict under 'mo"),
    "not contiguous": (
        change(lambda s: s.update({"lm_head.weight": torch.ones(128, 384).half().T})),
        r"tensor lm_head\.weight is not stored contiguously",
    ),
    "repeated": (
        change(lambda s: s.update({"lm_head.weight": torch.ones(1, 1).half().expand(384, 128)})),
        r"tensor lm_head\.weight is not stored contiguously",
    ),
    "complex": (
        change(lambda s: s.update({"model.norm.weight": torch.ones(128, dtype=torch.cfloat)})),
        r"tensor model\.norm\.weight: dtype torch\.complex64 is not supported; download",
    ),
    "search result": (
        save(SEARCH_RESULT),
        r"holds the scales and clips of an AWQ search, not the quantized weights; pack it .*",
    ),
    "first layout": (
        change(first_layout),
        r"qzeros belongs to TinyChat's first format; convert",
    ),
    "not quantized": (save({"model.norm.weight": torch.ones(4)}), r"holds no quantized linear"),
    "groups that aren't": (
        change(lambda s: [s.update({n: torch.ones(7, 8)}) for n in s if n.endswith(".scales")]),
        r"_proj\.scales has 7 rows, which no group size .* gives for \d+ input channels; download",
    ),
    "name that lies": (
        lambda root: (root / PT).rename(root / "llm/a-g128-v2.pt"),
        r"a-g128-v2\.pt: its name says groups of 128, its scales are for 64; rename it: -g64-",
    ),
    "name that is impossible": (
        lambda root: (root / PT).rename(root / "llm/a-g96.x-v2.pt"),
        r"a-g96\.x-v2\.pt: its name says groups of 96, TinyChat has 128, 64 and 32; correct",
    ),
    "several": (
        lambda root: shutil.copyfile(root / PT, root / "llm/a-v2.pt"),
        r"llm: holds 2 quantized models: 'a-v2\.pt', 'vila-1\.5-.*'; remove all but the one",
    ),
    "search result alone": (
        lambda root: ((root / PT).unlink(), torch.save(SEARCH_RESULT, root / "llm/a-w4-g128.pt")),
        r"llm/a-w4-g128\.pt: holds the scales and clips of an AWQ search.*; pack it",
    ),
    "config of another layout": (
        set_key(
            "llm/config.json",
            "quantization_config",
            {"quant_method": "awq", "bits": 4, "group_size": 64},
        ),
        r"-v2\.pt is read only where there is no .* and no quantization_config .*; download",
    ),
    "missing tensor": (
        change(lambda s: s.pop(f"{UP}.scaled_zeros")),
        rf"llm: tensor {UP}\.scaled_zeros is missing; download",
    ),
    "unknown tensor": (
        change(lambda s: s.update({"ghost": torch.ones(1)})),
        r"-v2\.pt: tensor ghost is not part of the model that config\.json describes",
    ),
    "wrong dtype": (
        change(lambda s: s.update({f"{UP}.qweight": s[f"{UP}.qweight"].int()})),
        rf"tensor {UP}\.qweight is I32, must be I16; convert",
    ),
    "bf16 scales": (
        change(lambda s: s.update({f"{UP}.scales": s[f"{UP}.scales"].float()})),
        rf"tensor {UP}\.scales is F32, must be F16 or BF16; convert",
    ),
    "wrong shape": (
        change(lambda s: s.update({f"{UP}.scales": s[f"{UP}.scales"][:8].clone()})),
        rf"tensor {UP}\.scales is \[8, 256\], config\.json asks for \[16, 256\]; correct",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_open_refuses(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, message = CASES[case]
    root, _ = release(tmp_path)
    damage(root)
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(root))
    assert not (tmp_path / "unpickled").exists()


def test_torchs_own_unpickler_is_a_second_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a name ever pass our check, nothing of it runs all the same."""
    root, _ = release(tmp_path)
    save({"a": Call()})(root)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch_load, "PLAIN", re.compile(".*"))
    assert re.search(r"cannot be read as tensors \(UnpicklingError: .*; download", refused(root))
    assert not (tmp_path / "unpickled").exists()


def test_the_trap_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above keep from happening: an ordinary load runs the code."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Call()}, "x.pt")
    torch.load("x.pt", weights_only=False)
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s["model.norm.weight"].fill_(torch.nan),
            r"tensor model\.norm\.weight holds NaN",
        ),
        (
            lambda s: s[f"{Q_PROJ}.scales"].fill_(torch.inf),
            rf"tensor {Q_PROJ}\.scales holds NaN or",
        ),
        (
            lambda s: s[f"{Q_PROJ}.scaled_zeros"].mul_(1.1),
            rf"{PT}: {Q_PROJ}\.scaled_zeros: must be −scale times an integer in 0\.\.15, found",
        ),
        (lambda s: s[f"{Q_PROJ}.scales"][0, 0].zero_(), rf"{Q_PROJ}\.scales: must be positive"),
    ],
)
def test_wrong_values_are_found_on_reading(
    edit: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    root, _ = release(tmp_path)
    change(edit)(root)
    llm = open_checkpoint(root).llm
    with pytest.raises(VilaDeployError, match=message):
        llm.linear(Q_PROJ), llm.tensor("model.norm.weight")


def test_file_too_large_to_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux refuses to map more than it has memory and swap; torch says so in these words."""

    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)")

    root, _ = release(tmp_path)
    monkeypatch.setattr(torch, "load", load)
    assert re.search(rf"{PT}: its 0\.0 GB can't be mapped into memory; add swap", refused(root))


@pytest.mark.parametrize("edit", [{"x": torch.ones(1)}, {"model.norm.weight": torch.ones(3)}])
def test_file_that_changes_after_opening(edit: Tensors, tmp_path: Path) -> None:
    root, _ = release(tmp_path)
    llm = open_checkpoint(root).llm
    save(edit)(root)
    with pytest.raises(VilaDeployError, match=rf"{PT}: tensor model\.norm\.weight is no.*; downl"):
        llm.tensor("model.norm.weight")
