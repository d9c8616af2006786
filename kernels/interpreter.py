"""Whether kernels run in Triton's interpreter, and what old versions of it need for that."""

from __future__ import annotations

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def accept_new_numpy() -> None:
    """Triton before 3.9 takes an int of a one-element array, which numpy 2.4 no longer gives."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Any) -> None:
        original(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def interpret_library() -> None:
    """Triton's own functions too, if it was imported before the variable was set."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in (tl.standard, tl):
        for name, value in [*vars(module).items()]:
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


if INTERPRETED:
    accept_new_numpy()
    interpret_library()
