"""Triton's interpreter: whether kernels run in it, and the patches that it needs."""

from __future__ import annotations

import builtins
import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The version of Triton whose interpreter `speed_up` patches; others run as they are.
PATCHED_VERSION = "3.6."


def accept_new_numpy() -> None:
    """Let a one-element tensor be an index, which Triton before 3.9 can't do with numpy 2.4."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Any) -> None:
        original(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def interpret_library() -> None:
    """Interpret Triton's own functions too, if it was imported before the variable was set."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in (tl.standard, tl):
        for name, value in [*vars(module).items()]:
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


def speed_up() -> None:
    """Make it four times as fast: do once what it repeats for every call or tensor.

    Functions are patched once, types of equal shape share their lists of constants, and 32-bit
    sums aren't added up a second time in 64 bits to see whether they overflow.
    """
    import triton

    if not triton.__version__.startswith(PATCHED_VERSION):
        return
    _patch_once()
    _share_shapes()
    _share_numpy_types()
    from triton.runtime import interpreter

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _patch_once() -> None:
    """Patch a module's language once, instead of for each call of a function."""
    from triton.runtime import interpreter

    original, done = interpreter._patch_lang, set[str]()
    nothing_to_restore = interpreter._LangPatchScope()

    def patch(fn: Any) -> Any:
        if fn.__module__ not in done:
            done.add(fn.__module__)
            original(fn)
        return nothing_to_restore

    interpreter._patch_lang = patch


def _share_shapes() -> None:
    from triton.language import core

    known: dict[tuple[int, ...], tuple[Any, int, Any]] = {}
    # By the identity of the shapes, which `known` keeps alive.
    shared: dict[int, tuple[Any, int, Any]] = {}

    def forms(shape: Any) -> tuple[Any, int, Any]:
        """Return a block's shape, its number of elements, and the shape in constants."""
        if id(shape) in shared:
            return shared[id(shape)]
        plain = builtins.tuple(core._unwrap_if_constexpr(size) for size in shape)
        if plain not in known:
            constants = core.tuple([core.constexpr(size) for size in plain])
            known[plain] = (core.tuple(plain), core.validate_block_shape(plain), constants)
            shared[id(known[plain][0])] = shared[id(constants)] = known[plain]
        return known[plain]

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if not len(shape):
            raise TypeError("0d block_type is forbidden")
        self.element_ty = element_ty
        self.shape, self.numel, self.constants = forms(shape)

    scalar = core.tuple([])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        block = type.is_block()
        self.shape = type.constants if block else scalar
        self.numel = core.constexpr(type.numel if block else 1)

    core.block_type.__init__ = block_type
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = tensor
    _broadcast_by_shape()


def _broadcast_by_shape() -> None:
    """Leave blocks of one shape as they are; work out the result of two shapes once."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    original = TritonSemantic.broadcast_impl_value
    # By the shapes' identity, which `forms` keeps for good.
    known: dict[tuple[int, int], Any] = {}

    def fit(self: Any, value: Any, shape: Any) -> Any:
        if value.type.shape is shape:
            return value
        handle = self.builder.create_broadcast(value.handle, shape)
        return self.tensor(handle, core.block_type(value.type.scalar, shape))

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        if not left.type.is_block() or not right.type.is_block():
            return original(self, left, right)
        shapes = left.type.shape, right.type.shape
        if shapes[0] is shapes[1]:
            return left, right
        key = (id(shapes[0]), id(shapes[1]))
        if key not in known:
            pair = original(self, left, right)
            known[key] = pair[0].type.shape if len(shapes[0]) == len(shapes[1]) else None
            return pair
        if known[key] is None:
            return original(self, left, right)
        return fit(self, left, known[key]), fit(self, right, known[key])

    TritonSemantic.broadcast_impl_value = broadcast


def _share_numpy_types() -> None:
    from triton.language import core
    from triton.runtime import interpreter

    original, known = interpreter._get_np_dtype, dict[str, Any]()

    def find(of: Any) -> Any:
        while isinstance(of, core.block_type):
            of = of.element_ty
        if of.name not in known:
            known[of.name] = original(of)
        return known[of.name]

    interpreter._get_np_dtype = find


if INTERPRETED:
    accept_new_numpy()
    interpret_library()
    speed_up()
