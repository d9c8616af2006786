"""Pages keep to the field's words: one word for each thing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documents import FENCE, pages
from tests.support.paths import REPOSITORY

# Word: what to write instead. Code, such as the folder `pictures`, is left out.
REPLACED = {
    r"pictures?": "images",
    r"feed-?back": "GPTQ",
    r"moments?": "Hessian",
    r"pick": "argmax",
    r"peers?": "baselines",
    r"same (?:most likely|top) token": "top-1 agreement",
    r"shipped (?:data|texts|images|ones)": "built-in",
    r"rounded to nearest": "RTN",
}
CODE = re.compile(r"`[^`]*`|<[^>]*>|\]\([^)]*\)")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_words(page: Path) -> None:
    text = CODE.sub("", FENCE.sub("", page.read_text("utf-8")))
    for word, instead in REPLACED.items():
        found = re.search(rf"^.*\b{word}\b.*$", text, re.M | re.I)
        assert not found, f"write {instead}: {found[0]}"
