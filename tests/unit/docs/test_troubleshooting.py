"""Messages quoted in docs/troubleshooting.md are ones that the code can print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

QUOTE = re.compile(r"^\| `([^`]+)` \|", re.M)
QUOTES = QUOTE.findall((REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8"))


def strings(path: Path) -> Iterator[str]:
    """Return the string constants of a module, those of f-strings in pieces."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def messages() -> str:
    files = (REPOSITORY / "vila_deploy").rglob("*.py")
    return "\n".join(text for file in files for text in strings(file))


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_message_exists(quote: str, messages: str) -> None:
    assert quote in messages


def test_messages_are_quoted() -> None:
    assert len(QUOTES) > 10
