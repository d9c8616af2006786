"""Objects that take exactly the calls that NVIDIA's own bindings take, by their signatures.

A call goes to a stand-in's method of the same name only when the real class has the method and its
signature takes the arguments. pybind11 writes signatures into docstrings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

BRACKETS = {"(": 1, "[": 1, "<": 1, "{": 1, ")": -1, "]": -1, ">": -1, "}": -1}
PREFIX = re.compile(r"tensorrt_bindings\.tensorrt\.(\w+)")


@dataclass(frozen=True)
class Parameter:
    name: str
    annotation: str
    optional: bool


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    returns: str

    def takes(self, real: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
        if len(arguments) > len(self.parameters):
            return False
        given = dict(zip((p.name for p in self.parameters), arguments, strict=False))
        if given.keys() & named.keys():
            return False
        given |= named
        known = {parameter.name: parameter for parameter in self.parameters}
        required = {p.name for p in self.parameters if not p.optional}
        return (
            given.keys() <= known.keys()
            and required <= given.keys()
            and all(fits(real, known[name].annotation, value) for name, value in given.items())
        )


def signatures(documentation: str, name: str) -> list[Signature]:
    """Return every overload of a function, without its `self`."""
    found = []
    for line in documentation.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.*)$", line.strip())
        if match:
            parts = [_parameter(part) for part in _split(match[1])]
            found.append(Signature(tuple(parts[1:]), match[2]))
    return found


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += BRACKETS.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _parameter(text: str) -> Parameter:
    name, _, rest = text.partition(":")
    annotation, default, _ = rest.partition(" = ")
    return Parameter(name.strip(), annotation.strip(), bool(default))


def fits(real: Any, annotation: str, value: Any) -> bool:
    """Return whether pybind11 would take `value` for a parameter."""
    kind = PREFIX.search(annotation)
    if kind is not None and kind[1] not in ("Dims", "tensorrt"):
        expected = getattr(real, kind[1])
        return isinstance(value, expected) or (
            isinstance(value, Checked) and issubclass(value.kind, expected)
        )
    if isinstance(value, Checked):
        return False
    if annotation in ("int", "typing.SupportsInt"):
        return isinstance(value, int)
    if annotation == "bool":
        return isinstance(value, bool)
    return not annotation.startswith("str") or isinstance(value, str)


def check(real: Any, owner: str, name: str, function: Any, *given: Any, **named: Any) -> str:
    """Return the annotation of the result; raise AssertionError for arguments it doesn't take."""
    known = signatures(function.__doc__ or "", name)
    for signature in known:
        if signature.takes(real, given, named):
            return signature.returns
    raise AssertionError(f"{owner}.{name} does not take {given} {named}; it takes {known}")


class Checked:
    """An object of the real class `kind`, whose work the stand-in `behaviour` does."""

    def __init__(self, real: Any, kind: type, behaviour: Any):
        values = {"real": real, "kind": kind, "behaviour": behaviour}
        object.__setattr__(self, "__dict__", values)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kind, name)  # raises AttributeError where the real class has none
        work = getattr(self.behaviour, name, None)
        if isinstance(found, property):
            returns = (found.fget.__doc__ or "").partition("-> ")[2].strip()
            return wrap(self.real, returns, default(self.real, returns) if work is None else work)

        def call(*given: Any, **named: Any) -> Any:
            returns = check(self.real, self.kind.__name__, name, found, *given, **named)
            if work is None:
                return wrap(self.real, returns, default(self.real, returns))
            named = {key: unwrap(value) for key, value in named.items()}
            return wrap(self.real, returns, work(*map(unwrap, given), **named))

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        found = getattr(self.kind, name)
        assert isinstance(found, property)
        assert found.fset is not None, f"{self.kind.__name__}.{name} is read-only"
        setattr(self.behaviour, name, value)


class Unspecified:
    """Stands in where nothing depends on an object's work."""


def default(real: Any, returns: str) -> Any:
    """Return what a call returns whose work the stand-in leaves out: success."""
    if PREFIX.match(returns):
        return Unspecified()
    return {"bool": True, "int": 0, "None": None}.get(returns)


def wrap(real: Any, returns: str, value: Any) -> Any:
    kind = PREFIX.match(returns)
    plain = value is None or isinstance(value, (bool, int, str, bytes, tuple))
    return Checked(real, getattr(real, kind[1]), value) if kind and not plain else value


def unwrap(value: Any) -> Any:
    return value.behaviour if isinstance(value, Checked) else value


class CheckedModule:
    """The bindings' module; the classes in `created` make objects of the stand-in."""

    def __init__(self, real: Any, created: dict[str, Any]):
        self._real, self._created = real, created

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        if name not in self._created:
            return found

        def create(*given: Any, **named: Any) -> Checked:
            check(self._real, name, "__init__", found.__init__, *given, **named)
            return Checked(self._real, found, self._created[name](*map(unwrap, given)))

        return create
