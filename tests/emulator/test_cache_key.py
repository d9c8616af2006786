"""A kernel's key does not depend on what a process has compiled before it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

import pytest
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from vila_deploy import kernels
from vila_deploy.kernels.cache_key import callees, make_key


def functions() -> list[Any]:
    """Return every function under `triton.jit` of the package, in the order of their modules."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
    ]
    found = {id(value): value for m in modules for value in vars(m).values()}
    return [value for value in found.values() if isinstance(value, JITFunction)]


def keys(order: Iterable[Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the keys that functions get in a process that needs them in this order."""
    with monkeypatch.context() as fresh:
        for function in every_function():
            fresh.setattr(function, "hash", None)
            fresh.setattr(function, "used_global_vals", {})
        for function in order:
            make_key(function)
        return {function.__name__: function.cache_key for function in order}


def every_function() -> list[Any]:
    """Return the package's functions, and those of Triton's that they call."""
    found: dict[int, Any] = {}
    left = functions()
    while left:
        function = left.pop()
        if id(function) not in found:
            found[id(function)] = function
            left += callees(function)
    return list(found.values())


def test_keys_are_the_same_in_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = keys(functions(), monkeypatch)
    assert len(forwards) > 30
    assert keys(functions()[::-1], monkeypatch) == forwards
    for function in functions():
        name = function.__name__
        assert keys([function], monkeypatch) == {name: forwards[name]}, name


def test_one_name_is_one_constant() -> None:
    """A key lists constants by their names and the addresses of their modules."""
    for function in functions():
        make_key(function)
        values: dict[str, set[object]] = {}
        for (name, _), (value, _) in function.used_global_vals.items():
            if isinstance(value, constexpr):
                values.setdefault(name, set()).add(value.value)
        assert all(len(found) == 1 for found in values.values()), (function.__name__, values)
