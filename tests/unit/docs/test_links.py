"""Links of the Markdown files: files and anchors exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.documents import anchors, links, pages
from tests.support.paths import REPOSITORY

ELSEWHERE = ("http://", "https://", "mailto:")


def broken(page: Path) -> list[str]:
    """Return the links of `page` to files or headings of the repository that are not there."""
    missing = []
    for link in links(page):
        if link.startswith(ELSEWHERE):
            continue
        path, _, anchor = link.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(link)
    return missing


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#other) [c](none.md) ![d](e.png)\n", "utf-8")
    assert broken(page) == ["#other", "none.md", "e.png"]


def test_every_guide_is_in_the_index() -> None:
    index = REPOSITORY / "docs" / "index.md"
    named = {link.partition("#")[0] for link in links(index)}
    assert {path.name for path in index.parent.glob("*.md")} - named == {"index.md"}
