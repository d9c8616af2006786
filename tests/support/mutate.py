"""Random damage to a checkpoint folder, for tests that nothing hostile ends in a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = "@deep@"  # replaced in the text: json.dumps itself can't write nesting that deep
HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    10**6,
    2**31,
    2**63,
    10**400,
    0.5,
    -1e308,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "../../../etc/passwd",
    "/dev/zero",
    "a" * 10_000,
    "new\nline \x1b[31m\x00",
    "\ud800",
    "F16",
    "model.safetensors",
    [],
    [None],
    [0, 0],
    [2**62, 2**62],
    list(range(1000)),
    {},
    {"a": {"b": []}},
    DEEP,
)


def mutate(root: Path, rng: random.Random) -> str:
    """Damages one thing under `root` and says what; equal seeds do equal damage."""
    return rng.choice(_MUTATIONS)(root, rng)


def _files(root: Path, suffix: str = "") -> list[Path]:
    return sorted(p for p in root.rglob(f"*{suffix}") if p.is_file() and not p.is_symlink())


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _position(size: int, rng: random.Random) -> int:
    """Near the beginning every other time: that is where headers lie."""
    return rng.randrange(min(size, 400) if rng.random() < 0.5 else size)


def _change_bytes(root: Path, rng: random.Random) -> str:
    path = rng.choice([path for path in _files(root) if path.stat().st_size])
    content = bytearray(path.read_bytes())
    at = _position(len(content), rng)
    kind = rng.choice(("flip", "truncate", "delete", "insert", "random", "ones", "append"))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[at:]
    elif kind == "delete":
        del content[at : at + rng.randint(1, 64)]
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.randint(1, 64))
    elif kind == "random":
        content[at : at + 32] = rng.randbytes(len(content[at : at + 32]))
    elif kind == "ones":
        content[at : at + 32] = b"\xff" * len(content[at : at + 32])
    else:
        content += rng.randbytes(rng.randint(1, 64))
    path.write_bytes(content)
    return f"{kind} at byte {at} of {_name(path, root)}"


def _change_json(root: Path, rng: random.Random) -> str:
    path = rng.choice(_files(root, ".json"))
    values = json.loads(path.read_text("utf-8"))
    what = change_value(values, rng)
    path.write_text(dump_json(values), "utf-8", errors="surrogatepass")
    return f"{what} in {_name(path, root)}"


def _change_header(root: Path, rng: random.Random) -> str:
    path = rng.choice(_files(root, ".safetensors"))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    values = json.loads(content[8:end])
    what = change_value(values, rng)
    header = dump_json(values).encode("utf-8", "surrogatepass")
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    return f"{what} in the header of {_name(path, root)}"


def change_value(values: Any, rng: random.Random) -> str:
    """One place in a JSON tree: another value, no value, another key, or a neighbour's value."""
    holder, keys = values, list(values)
    while True:
        key = rng.choice(keys)
        child = holder[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.3:
            break
        holder = child
        keys = list(child) if isinstance(child, dict) else list(range(len(child)))
    kind = rng.choice(("hostile", "hostile", "hostile", "remove", "rename", "neighbour"))
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", "", "../x", "new\nline", DEEP))] = holder.pop(key)
    elif kind == "neighbour":
        holder[key] = holder[rng.choice(keys)]
    else:
        value = rng.choice(HOSTILE_VALUES)
        holder[key] = value
        return f"{key!r} set to {str(value)[:40]!r}"
    return f"{kind} of {key!r}"


def dump_json(values: Any) -> str:
    return json.dumps(values).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)


def _change_header_size(root: Path, rng: random.Random) -> str:
    path = rng.choice(_files(root, ".safetensors"))
    content = path.read_bytes()
    size = rng.choice((0, 1, 2, 2**20, 2**31, 2**40, 2**63, 2**64 - 1))
    path.write_bytes(size.to_bytes(8, "little") + content[8:])
    return f"header size {size} in {_name(path, root)}"


def _put_non_finite(root: Path, rng: random.Random) -> str:
    path = rng.choice(_files(root, ".safetensors"))
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    at = rng.randrange(begin, len(content) - 4) & ~3
    content[at : at + 4] = rng.choice((b"\x00\x7e\x00\x7e", b"\x00\xfc\x00\xfc", b"\xff" * 4))
    path.write_bytes(content)
    return f"NaN or Inf at byte {at} of {_name(path, root)}"


def _remove(root: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        folder = rng.choice(sorted(path for path in root.iterdir() if path.is_dir()))
        shutil.rmtree(folder)
        return f"removed {_name(folder, root)}/"
    path = rng.choice(_files(root))
    path.unlink()
    return f"removed {_name(path, root)}"


def _swap(root: Path, rng: random.Random) -> str:
    one, other = rng.sample(_files(root, rng.choice(("", ".json", ".safetensors"))), 2)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"swapped {_name(one, root)} and {_name(other, root)}"


def _replace(root: Path, rng: random.Random) -> str:
    """Something else under a file's name: a link, a folder, a pipe, nothing, rubbish."""
    path = rng.choice(_files(root))
    others = [other for other in _files(root) if other != path]
    kind = rng.choice(
        ("loop", "dangling", "device", "other", "folder", "parent", "pipe", "empty", "rubbish")
    )
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("empty", "rubbish"):
        path.write_bytes(rng.randbytes(1000) if kind == "rubbish" else b"")
    else:
        targets = {
            "loop": path.name,
            "dangling": "nothing-here",
            "device": "/dev/zero",
            "other": str(rng.choice(others)),
            "parent": "..",
        }
        path.symlink_to(targets[kind])
    return f"{kind} in place of {_name(path, root)}"


_MUTATIONS: tuple[Callable[[Path, random.Random], str], ...] = (
    _change_bytes,
    _change_bytes,
    _change_bytes,
    _change_json,
    _change_json,
    _change_json,
    _change_header,
    _change_header,
    _change_header_size,
    _put_non_finite,
    _remove,
    _swap,
    _replace,
    _replace,
)
