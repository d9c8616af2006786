"""One Chromium for all tests of the page; `make test-web` installs what they need."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

needed = ("playwright", "axe_playwright_python")
collect_ignore_glob = [] if all(map(find_spec, needed)) else ["test_*.py"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from tests.support.browser import chromium

    with chromium() as started:
        yield started
