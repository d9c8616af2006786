"""Single, exact kinds of damage to a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.utils.errors import VilaDeployError

Damage = Callable[[Path], Any]
LLM = "llm/model.safetensors"
TOWER = "vision_tower/model.safetensors"
PROJECTOR = "mm_projector/model.safetensors"
INDEX = "llm/model.safetensors.index.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def edit_json(file: str, change: Callable[[dict], Any]) -> Damage:
    def damage(root: Path) -> None:
        values = json.loads((root / file).read_text("utf-8"))
        change(values)
        (root / file).write_text(json.dumps(values), "utf-8")

    return damage


def set_key(file: str, key: str, value: Any) -> Damage:
    return edit_json(file, lambda values: values.update({key: value}))


def edit_bytes(file: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda root: (root / file).write_bytes(change((root / file).read_bytes()))


def write(file: str, content: bytes) -> Damage:
    return lambda root: (root / file).write_bytes(content)


def edit_tensors(file: str, change: Callable[[dict], Any]) -> Damage:
    def damage(root: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(root / file).items()}
        change(tensors)
        save_file(tensors, root / file)

    return damage


def edit_header(file: str, change: Callable[[dict], Any]) -> Damage:
    def damage(root: Path) -> None:
        content = (root / file).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        values = json.loads(content[8:end])
        change(values)
        header = json.dumps(values).encode()
        (root / file).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])

    return damage


def set_entry(file: str, tensor: str, key: str, value: Any) -> Damage:
    return edit_header(file, lambda values: values[tensor].update({key: value}))


def remove(path: str) -> Damage:
    def damage(root: Path) -> None:
        target = root / path
        for file in target.iterdir() if target.is_dir() else ():
            file.unlink()
        target.rmdir() if target.is_dir() else target.unlink()

    return damage


def only_pickle(name: str) -> Damage:
    """llm/ as a release that has its weights in a pickle; reading that would leave a trace."""

    def damage(root: Path) -> None:
        for path in (root / "llm").glob("*.safetensors"):
            path.unlink()
        (root / "llm" / name).write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")

    return damage


def flip_last_bit(content: bytes) -> bytes:
    return content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]


def refused(root: Path) -> str:
    """The message with which open_checkpoint refuses `root`."""
    with pytest.raises(VilaDeployError) as caught:
        open_checkpoint(root)
    message = str(caught.value)
    assert message.startswith(str(root))
    assert message.isprintable()
    assert len(message) < 500 + len(str(root))
    return message


def is_refused(read: Callable[[], Any]) -> bool:
    """Whether `read` raises; what it raises must be one line for the user."""
    try:
        read()
    except VilaDeployError as error:
        line = str(error)
    else:
        return False
    assert "\n" not in line
    assert len(line) < 600
    return True
