"""The page before vila-serve with tiny-vila: its answers are those of vila-chat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser

from tests.support.browser import Visit, visit
from tests.support.commands import succeed
from tests.support.paths import TINY_VILA, TINY_VILA_EXAMPLE
from tests.support.served_process import vila_serve
from vila_deploy import Conversation, open_engine
from vila_deploy.server.page_files import PAGE_FILES

TWO, THREE, FOUR = (
    TINY_VILA_EXAMPLE / "pictures" / f"{number}.png" for number in ("two", "three", "four")
)
DESCRIBE = "Describe the picture."
COUNT = "How many shapes are in the picture?"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "tiny-vila"
    succeed("vila-build-engine", TINY_VILA, "--target", "cpu", "-o", folder)
    return folder


@pytest.fixture(scope="module")
def url(engine: Path) -> Iterator[str]:
    with vila_serve(engine) as address:
        yield address


@pytest.fixture(params=[1000, 360])
def page(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """The page in a wide and in a narrow window, which nothing may overflow."""
    with visit(browser, url, request.param) as visited:
        yield visited
        width = visited.page.evaluate("document.documentElement.scrollWidth")
        assert width == request.param
        assert visited.outside_requests() == []
        assert visited.errors == []


@pytest.fixture
def expected(engine: Path) -> Iterator[Conversation]:
    """vila-chat's conversation."""
    with open_engine(engine) as opened:
        yield opened.chat()


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_an_image_is_asked_about(page: Visit, expected: Conversation, way: str) -> None:
    getattr(page, way)(TWO)
    assert page.ask(DESCRIBE) == expected.ask(DESCRIBE, [TWO]).text
    figures = page.page.inner_text(".figures")
    assert "tokens/s · first token after " in figures


def test_two_images_over_three_turns(page: Visit, expected: Conversation) -> None:
    page.choose(TWO)
    assert page.ask(COUNT) == expected.ask(COUNT, [TWO]).text
    page.drop(FOUR)
    assert page.ask(COUNT) == expected.ask(COUNT, [FOUR]).text
    assert page.ask(DESCRIBE) == expected.ask(DESCRIBE).text
    page.page.click(".again")
    assert page.answer() == expected.turns[-1][1]
    page.page.click("#new")
    expected.reset()
    page.choose(TWO, THREE)
    assert page.ask(DESCRIBE) == expected.ask(DESCRIBE, [TWO, THREE]).text


def test_settings_change_the_answer(page: Visit, expected: Conversation) -> None:
    page.choose(THREE)
    whole = expected.ask(DESCRIBE, [THREE]).text
    page.set(max_tokens="3")
    short = page.ask(DESCRIBE)
    assert whole.startswith(short)
    assert "cut short at the limit of tokens" in page.page.inner_text(".figures")
    word = whole.split()[4]
    page.set(max_tokens="", stop_strings=word)
    page.page.click("#new")
    page.choose(THREE)
    assert page.ask(DESCRIBE) == whole[: whole.index(word)].rstrip()


def test_stop_frees_the_server_and_regenerate_answers(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, engine: Path
) -> None:
    from tests.support.serving import serving

    with serving(engine, pause_s=0.2) as server, visit(browser, server.url) as page:
        page.choose(FOUR)
        page.send(DESCRIBE)
        page.page.wait_for_selector(".answer:not(:empty)")
        page.page.keyboard.press("Escape")
        stopped = page.answer()
        end = time.monotonic() + 10
        while server.metric("num_requests_running"):
            assert time.monotonic() < end
            time.sleep(0.05)
        # At its own speed again.
        del server.engine.session.decode
        page.page.click(".again")
        whole = page.answer()
        assert whole.startswith(stopped)
        assert len(whole) > len(stopped)
        assert page.errors == []


def test_a_wrong_key_is_said_in_words(browser: Browser, engine: Path) -> None:
    with vila_serve(engine, "--api-key", "the-right-key") as url, visit(browser, url) as page:
        assert page.notice() == "This server asks for an API key. Enter it in Settings."
        page.set(key="wrong")
        page.page.wait_for_selector("#notice:has-text('does not know this API key')")
        page.ask("Hello?")
        assert "does not know this API key" in page.page.inner_text(".turn [role=alert]")
        page.set(key="the-right-key")
        page.page.wait_for_selector("#model:text-is('tiny-vila')")
        page.page.click(".again")
        page.page.wait_for_selector(".answer:not(:empty)")


def test_the_servers_refusals_are_shown(browser: Browser, engine: Path, tmp_path: Path) -> None:
    Image.effect_noise((1200, 900), 99).convert("RGB").save(tmp_path / "noise.png")
    limits = ("--max-images", "1", "--max-body-mb", "0.2", "--max-image-megapixels", "0.5")
    with vila_serve(engine, *limits) as url, visit(browser, url) as page:
        page.drop(tmp_path / "noise.png")
        assert "was scaled down to " in page.notice()
        page.ask(DESCRIBE)
        assert page.page.inner_text(".answer")
        page.drop(TWO)
        page.ask(DESCRIBE)
        refusal = page.page.locator(".turn:last-child [role=alert]")
        assert refusal.inner_text().startswith("messages: has 2 images")
        page.ask("<image>")
        assert "the text holds <image>" in refusal.inner_text()


def test_files_and_headers(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for path in PAGE_FILES:
            response = client.get(path)
            assert response.status_code == 200
            policy = response.headers["content-security-policy"]
            assert "unsafe" not in policy
            assert policy.startswith("default-src 'none'")
        assert client.get("/page/app.js").status_code == 404
