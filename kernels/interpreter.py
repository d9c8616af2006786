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


if INTERPRETED:
    accept_new_numpy()
