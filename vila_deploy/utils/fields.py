"""Typed reading of JSON objects: every wrong key names its file, its key and what was expected."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.files import read_json_object

if TYPE_CHECKING:
    from typing import Self  # Boards with JetPack 6 have Python 3.10.

_MISSING = object()
_FLOAT_LIMIT = 1e12


class Fields:
    """A JSON object together with the file it came from.

    Args:
        values: the object.
        source: the file, for messages.
        prefix: where the object lies inside the file, for messages.
    """

    def __init__(self, values: dict[str, Any], source: Path, prefix: str = ""):
        self.values, self.source, self.prefix = values, source, prefix

    @classmethod
    def from_file(cls, path: Path) -> Fields:
        return cls(read_json_object(path), path)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, what: str, fix: str | None = None) -> VilaDeployError:
        where = f"{self.source}: {self.prefix}{key}"
        return VilaDeployError(what, where=where, fix=fix or "correct this key")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.error(key, "is missing", "add this key or download the file again")
        return default

    def integer(
        self, key: str, default: Any = _MISSING, *, low: int = 1, high: int = 1 << 24
    ) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be an integer in {low}..{high}, found {short(value)}")
        return value

    def number(
        self, key: str, default: Any = _MISSING, *, low: float = 0.0, high: float = _FLOAT_LIMIT
    ) -> float:
        value = self._get(key, default)
        if not _is_number(value, low, high):
            raise self.error(key, f"must be a number in {low}..{high}, found {short(value)}")
        return float(value)

    def boolean(self, key: str, default: Any = _MISSING) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, found {short(value)}")
        return value

    def text(self, key: str, default: Any = _MISSING) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, found {short(value)}")
        return value

    def choice(
        self, key: str, allowed: Collection[str], default: Any = _MISSING, *, what: str = "value"
    ) -> str:
        value = self.text(key, default)
        if value not in allowed:
            raise self.error(
                key,
                f"unknown {what} {short(value)}",
                f"this version supports {', '.join(sorted(allowed))}",
            )
        return value

    def child(self, key: str) -> Self:
        value = self._get(key, _MISSING)
        if not isinstance(value, dict):
            raise self.error(key, f"must be an object, found {short(value)}")
        return type(self)(value, self.source, f"{self.prefix}{key}.")

    def integers(
        self, key: str, default: Any = _MISSING, *, low: int = 0, high: int = 1 << 24
    ) -> list[int]:
        """A list of integers; a single integer counts as a list of one."""
        value = self._get(key, default)
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int and low <= item <= high for item in items):
            raise self.error(key, f"must hold integers in {low}..{high}, found {short(value)}")
        return items

    def numbers(self, key: str, default: Any = _MISSING, *, count: int) -> tuple[float, ...]:
        value = self._get(key, default)
        ok = isinstance(value, list | tuple) and len(value) == count
        if not ok or not all(_is_number(item, -_FLOAT_LIMIT, _FLOAT_LIMIT) for item in value):
            raise self.error(key, f"must hold {count} finite numbers, found {short(value)}")
        return tuple(float(item) for item in value)


def _is_number(value: Any, low: float, high: float) -> bool:
    """False for booleans and NaN too; comparing works for integers that no float can hold."""
    return type(value) in (int, float) and low <= value <= high
