"""Quantize VILA checkpoints to 4 bits, build engines for them and measure their speed.

from vila_deploy import open_engine

with open_engine("vila-3b-cpu") as engine:
    print(engine.chat().ask("What is this?", images=["cat.jpg"]).text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vila_deploy.utils.version import __version__

if TYPE_CHECKING:
    from vila_deploy.builder import build_engine
    from vila_deploy.engine.sampling import SamplingParams
    from vila_deploy.quantize import quantize_checkpoint as quantize
    from vila_deploy.runtime.conversation import Conversation
    from vila_deploy.runtime.open_engine import open_engine

__all__ = [
    "Conversation",
    "SamplingParams",
    "__version__",
    "build_engine",
    "open_engine",
    "quantize",
]

# Imported when first asked for: `import vila_deploy` loads neither numpy nor torch. The package
# quantize is itself callable.
_MODULES = {
    "Conversation": "vila_deploy.runtime.conversation",
    "SamplingParams": "vila_deploy.engine.sampling",
    "build_engine": "vila_deploy.builder",
    "open_engine": "vila_deploy.runtime.open_engine",
}


def __getattr__(name: str) -> Any:
    if name == "quantize":
        return import_module("vila_deploy.quantize")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
