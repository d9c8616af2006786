"""How to install what a part of vila-deploy needs and the rest doesn't."""

from __future__ import annotations


def install_extra(extra: str) -> str:
    """Return the command for an extra of pyproject.toml; vila-deploy is on no package index."""
    return f"in vila-deploy's checkout: pip install '.[{extra}]'"
