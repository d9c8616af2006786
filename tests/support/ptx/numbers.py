"""Types of PTX as numpy has them, and immediate operands."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "pred": np.bool_,
        "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
        "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
        "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
        "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    }.items()
}  # fmt: skip
UNSIGNED: dict[int, np.dtype[Any]] = {bits: DTYPES[f"u{bits}"] for bits in (8, 16, 32, 64)}
SIGNED: dict[int, np.dtype[Any]] = {bits: DTYPES[f"s{bits}"] for bits in (8, 16, 32, 64)}


def bits_of(kind: str) -> int:
    """Return the width of a type in bits."""
    return DTYPES[kind].itemsize * 8


def is_signed(kind: str) -> bool:
    return kind[0] == "s"


@cache
def immediate(text: str, kind: str) -> Any:
    """Return a literal like `-1`, `0x9991U` or `0f3F800000` as a numpy scalar of the type."""
    dtype = DTYPES[kind]
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16)).view(np.float32 if kind == "f32" else np.uint32)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.bool_(value)
    bits = dtype.itemsize * 8
    return np.array(value & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype)[()]
