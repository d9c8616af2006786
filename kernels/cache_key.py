"""The key by which Triton finds a compiled kernel, made the same in every process.

Triton 3.6 and 3.7 put into a function's key the constants of the functions that it calls, but only
of those whose own key was made before (`DependenciesFinder._update_hash` in triton/runtime/jit.py).
So a key would depend on what a process had compiled before, and a kernel that another process has
compiled would be compiled once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITCallable


def make_key(function: Any) -> None:
    """Make the key of a function under `triton.jit`, after those of all that it calls."""
    _make(function, set())


def _make(function: Any, begun: set[int]) -> None:
    if function.hash is not None or id(function) in begun:
        return
    begun.add(id(function))
    for callee in callees(function):
        _make(callee, begun)
    _ = function.cache_key


def callees(function: Any) -> Iterator[Any]:
    """Yield the functions under `triton.jit` that a function names, those of modules too."""
    raw = function.fn
    names = raw.__code__.co_names
    known = [raw.__globals__[name] for name in names if name in raw.__globals__]
    modules = [value for value in known if isinstance(value, ModuleType)]
    known += [getattr(module, name, None) for module in modules for name in names]
    yield from (value for value in known if isinstance(value, JITCallable))
