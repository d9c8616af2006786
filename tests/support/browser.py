"""Drive Chromium as a visitor of the page would: choose, drop and paste files, read answers."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWERED = ".turn:last-child .again"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield the Chromium of this computer, which `make test-web` installs."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert program, "no Chromium; install one, as with apt-get install chromium"
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """One open page and what it did: requests, and errors on its console."""

    page: Page
    url: str
    requested: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def ask(self, question: str) -> str:
        """Type a question, send it with Enter, and return what the answer says at its end."""
        self.send(question)
        return self.answer()

    def send(self, question: str) -> None:
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def answer(self) -> str:
        """Wait for the end of the last answer and return it."""
        self.page.wait_for_selector(ANSWERED)
        return self.page.locator(".turn:last-child .answer").inner_text()

    def choose(self, *files: Path) -> None:
        """Add image files through the browser's own dialog."""
        with self.page.expect_file_chooser() as chooser:
            self.page.click("#add")
        self._added(len(files), lambda: chooser.value.set_files(list(map(str, files))))

    def drop(self, *files: Path) -> None:
        """Drop files in the middle of the page as the desktop would."""
        self._added(len(files), lambda: self.drag("dragEnter", "dragOver", "drop", files=files))

    def drag(self, *kinds: str, files: Sequence[Path]) -> None:
        """Send events of the desktop's drag and drop, in the middle of the page."""
        size = self.page.viewport_size
        assert size
        data = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        client = self.page.context.new_cdp_session(self.page)
        for kind in kinds:
            event = {"type": kind, "x": size["width"] // 2, "y": size["height"] // 2}
            client.send("Input.dispatchDragEvent", {**event, "data": data})

    def paste(self, image: Path) -> None:
        """Put a PNG file into the clipboard, as copying an image does, and press Ctrl+V."""
        self.page.evaluate(
            """async (data) => {
                const bytes = Uint8Array.from(atob(data), (byte) => byte.charCodeAt(0));
                const blob = new Blob([bytes], { type: "image/png" });
                await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
            }""",
            base64.b64encode(image.read_bytes()).decode(),
        )
        self.page.focus("#question")
        self._added(1, lambda: self.page.keyboard.press("Control+V"))

    def thumbnails(self) -> int:
        return self.page.locator("#images li").count()

    def notice(self) -> str:
        return self.page.locator("#notice").inner_text()

    def set(self, **settings: str) -> None:
        """Fill in the settings dialog; `stop_strings` is the field stop-strings."""
        self.page.click("#open-settings")
        for name, value in settings.items():
            self.page.fill(f"#{name.replace('stop_strings', 'stop-strings')}", value)
        self.page.click("#close-settings")

    def outside_requests(self) -> list[str]:
        return [url for url in self.requested if not url.startswith((self.url, "data:"))]

    def _added(self, count: int, add: Any) -> None:
        """Do `add` and wait for its thumbnails, if files are images, or for the notice."""
        after = self.thumbnails() + count
        add()
        self.page.wait_for_selector(f"#images li:nth-child({after}), #notice:not(:empty)")


@contextmanager
def visit(browser: Browser, url: str, width: int = 1000, **options: Any) -> Iterator[Visit]:
    """Yield the page at `url` in a window of its own; `options` are those of a browser context."""
    context = browser.new_context(
        viewport={"width": width, "height": 720},
        permissions=["clipboard-read", "clipboard-write"],
        **options,
    )
    context.set_default_timeout(60_000)
    page = context.new_page()
    visited = Visit(page, url)
    page.on("request", lambda request: visited.requested.append(request.url))
    page.on("pageerror", lambda error: visited.errors.append(str(error)))
    page.on(
        "console",
        lambda said: (
            visited.errors.append(said.text) if said.type in ("error", "warning") else None
        ),
    )
    page.goto(url)
    page.wait_for_selector("#model:not(:text-is('VILA')), #notice:not(:empty)")
    yield visited
    context.close()
