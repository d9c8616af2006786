"""The page before a server that answers at a word: files, keyboard, settings, errors, layout."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, expect

from tests.support.browser import Visit, visit
from tests.support.fake_server import FakeServer

NO_RESOURCE = "Failed to load resource"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as started:
        threading.Thread(target=started.serve_forever, args=(0.05,), daemon=True).start()
        yield started
        started.shutdown()


@pytest.fixture
def page(browser: Browser, server: FakeServer) -> Iterator[Visit]:
    """The open page; at the end nothing was asked of another host, nor did the console complain."""
    with visit(browser, server.url) as visited:
        yield visited
        assert visited.outside_requests() == []
        assert [error for error in visited.errors if NO_RESOURCE not in error] == []


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "red.png", tmp_path / "green.png"]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    return paths


def test_images_come_by_dialog_drop_and_paste(
    page: Visit, server: FakeServer, images: list[Path]
) -> None:
    page.choose(*images)
    page.drop(images[0])
    page.paste(images[1])
    assert page.thumbnails() == 4
    page.page.click("button[aria-label='Remove green.png']")
    assert page.thumbnails() == 3
    assert page.ask("What?") == "3 images, 1 messages: What?"
    assert page.thumbnails() == 0
    parts = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * 3 + ["text"]
    assert all(p["image_url"]["url"].startswith("data:image/png;base64,") for p in parts[:3])


def test_later_questions_bring_earlier_turns(
    page: Visit, server: FakeServer, images: list[Path]
) -> None:
    page.choose(images[0])
    page.ask("One?")
    page.choose(images[1])
    assert page.ask("Two?") == "1 images, 3 messages: Two?"
    roles = [message["role"] for message in server.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.page.click("#new")
    assert page.ask("Three?") == "0 images, 1 messages: Three?"


def test_a_drag_that_is_given_up(page: Visit, images: list[Path]) -> None:
    page.drag("dragEnter", "dragOver", files=images)
    expect(page.page.locator("#drop")).to_be_visible()
    page.drag("dragCancel", files=images)
    expect(page.page.locator("#drop")).to_be_hidden()
    assert page.thumbnails() == 0


def test_a_new_chat_while_an_answer_is_written(page: Visit, server: FakeServer) -> None:
    page.send("slow")
    page.page.wait_for_selector(".answer:has-text('word')")
    page.page.click("#new")
    assert page.ask("One?") == "0 images, 1 messages: One?"
    assert page.page.locator(".turn").count() == 1


def test_a_file_that_is_no_image_is_named(page: Visit, tmp_path: Path) -> None:
    (tmp_path / "<b>notes.png").write_text("no image")
    page.drop(tmp_path / "<b>notes.png")
    assert page.notice() == "<b>notes.png is not an image that this browser can read."
    assert page.thumbnails() == 0


def test_other_kinds_of_images_are_sent_as_png(
    page: Visit, server: FakeServer, tmp_path: Path
) -> None:
    svg = "<svg xmlns='http://www.w3.org/2000/svg' width='20' height='10'><script>1</script></svg>"
    (tmp_path / "a.svg").write_text(svg)
    page.drop(tmp_path / "a.svg")
    assert page.notice() == "a.svg is sent as PNG."
    page.ask("What?")
    url = server.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")


def test_images_are_scaled_down_only_for_the_servers_limits(
    browser: Browser, server: FakeServer, tmp_path: Path
) -> None:
    Image.effect_noise((400, 300), 99).convert("RGB").save(tmp_path / "noise.png")
    server.limits = {"max_image_pixels": 30_000, "max_body_bytes": 20_000}
    with visit(browser, server.url) as page:
        page.drop(tmp_path / "noise.png")
        assert "scaled down to 200 × 150" in page.notice()
        page.drop(tmp_path / "noise.png")
        page.ask("What?")
        assert "larger than this server takes" in page.notice()
    assert len(str(server.requests[0])) < 21_000


def test_stop_keeps_what_was_written_and_frees_the_server(page: Visit, server: FakeServer) -> None:
    for end in ("Escape", "click"):
        page.send("slow")
        page.page.wait_for_selector(".turn:last-child .answer:has-text('word')")
        page.page.keyboard.press(end) if end == "Escape" else page.page.click("#stop")
        assert page.answer().startswith("word ")
        assert "stopped" in page.page.inner_text(".turn:last-child .figures")
    page.ask("And now?")
    assert [m["role"] for m in server.requests[-1]["messages"]][:2] == ["user", "assistant"]
    page.page.wait_for_timeout(100)
    assert server.disconnected == 2


def test_regenerate_asks_the_same_again(page: Visit, server: FakeServer) -> None:
    page.ask("One?")
    page.ask("Two?")
    assert page.page.locator(".again").count() == 1
    page.page.click(".again")
    assert page.answer() == "0 images, 3 messages: Two?"
    assert server.requests[1] == server.requests[2]


def test_the_end_stays_in_view_unless_the_reader_has_scrolled_up(
    page: Visit, images: list[Path]
) -> None:
    behind = "() => { const s = document.getElementById('scroller');" + (
        " return s.scrollHeight - s.scrollTop - s.clientHeight; }"
    )
    page.ask("line\n" * 60)
    assert page.page.evaluate(behind) < 2
    page.choose(*images)
    page.page.wait_for_timeout(100)
    assert page.page.evaluate(behind) < 2
    page.page.mouse.move(500, 200)
    page.page.mouse.wheel(0, -600)
    page.page.wait_for_timeout(200)
    page.page.fill("#question", "more\n" * 5)
    page.page.wait_for_timeout(100)
    assert page.page.evaluate(behind) > 300


def test_questions_and_answers_are_text_alone(page: Visit) -> None:
    markup = "<img src=x onerror=alert(1)> <b>bold</b> &amp;"
    assert page.ask(markup).endswith(markup)
    assert page.page.inner_text(".asked p") == markup
    assert page.page.locator(".turn img, .turn b").count() == 0


def test_figures_and_copy(page: Visit) -> None:
    page.ask("a b c d e f g")
    figures = page.page.inner_text(".figures")
    assert figures.startswith("11 tokens · ")
    assert "tokens/s · first token after " in figures
    page.page.click(".under button:has-text('Copy')")
    page.page.wait_for_selector("text=Copied")
    copied = page.page.evaluate("navigator.clipboard.readText()")
    assert copied == "0 images, 1 messages: a b c d e f g"


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("busy", "The server is busy: try again in 3 s."),
        ("large", "The request is too large."),
        ("strange", "<b>not</b> a value of temperature; give a number."),
        ("error", "The engine has failed."),
        ("broken", "The connection ended before the answer did."),
    ],
)
def test_errors_are_said_in_words(
    page: Visit, server: FakeServer, question: str, error: str
) -> None:
    page.ask(question)
    assert page.page.inner_text(".turn:last-child [role=alert]") == error
    failed = question not in ("error", "broken")
    assert page.page.locator("button:has-text('Try again')").count() == failed
    page.ask("Next?")
    # What got no answer is not sent along.
    assert len(server.requests[-1]["messages"]) == (1 if failed else 3)


def test_a_server_that_has_gone(page: Visit, server: FakeServer) -> None:
    server.shutdown()
    server.server_close()
    page.ask("What?")
    assert page.page.inner_text("[role=alert] >> nth=0") == "The server cannot be reached."


def test_the_key_is_asked_for_and_kept_in_memory_only(browser: Browser, server: FakeServer) -> None:
    server.key = "secret"
    with visit(browser, server.url) as page:
        assert page.notice() == "This server asks for an API key. Enter it in Settings."
        page.ask("What?")
        assert "asks for an API key" in page.page.inner_text(".turn [role=alert]")
        page.page.click("text=Enter the key")
        assert page.page.evaluate("document.activeElement.id") == "key"
        page.page.fill("#key", "wrong")
        page.page.click("#close-settings")
        page.page.wait_for_selector("#notice:has-text('does not know this API key')")
        page.set(key="secret")
        expect(page.page).to_have_title("tiny-vila")
        page.page.click(".again")
        page.page.wait_for_selector(".answer:has-text('What?')")
        stored = "JSON.stringify([localStorage, sessionStorage, document.cookie])"
        assert page.page.evaluate(stored) == '[{},{},""]'


def test_settings_are_sent_and_empty_ones_are_not(page: Visit, server: FakeServer) -> None:
    page.ask("One?")
    assert set(server.requests[0]) == {"model", "messages", "stream", "stream_options"}
    page.set(
        temperature="0.5", top_p="0.9", max_tokens="7", system="Be brief.", stop_strings="END\n\n##"
    )
    page.ask("Two?")
    sent = server.requests[1]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (0.5, 0.9, 7)
    assert sent["stop"] == ["END", "##"]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", "3", "Temperature must be a number from 0 to 2."),
        ("top_p", "0", "Top p must be a number above 0, at most 1."),
        ("max_tokens", "1.5", "Max tokens must be a whole number of at least 1."),
    ],
)
def test_a_setting_out_of_its_range_is_named(
    page: Visit, field: str, value: str, message: str
) -> None:
    page.set(**{field: value})
    assert page.page.inner_text("#settings-error") == message
    assert page.page.is_visible("#settings")


def test_keyboard(page: Visit, server: FakeServer) -> None:
    keyboard = page.page.keyboard
    assert page.page.evaluate("document.activeElement.id") == "question"
    keyboard.type("first line")
    keyboard.press("Shift+Enter")
    keyboard.type("second line")
    keyboard.press("Enter")
    page.answer()
    assert server.requests[0]["messages"][0]["content"] == "first line\nsecond line"
    order = []
    for _ in range(5):
        keyboard.press("Shift+Tab")
        order.append(page.page.evaluate("document.activeElement.innerText"))
    assert order == ["Regenerate", "Copy", "Settings", "New chat", "Skip to the question"]
    keyboard.press("Enter")
    keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.innerText") == "Add images"


@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility_and_layout(
    browser: Browser, server: FakeServer, images: list[Path], width: int, scheme: str
) -> None:
    with visit(browser, server.url, width, color_scheme=scheme, reduced_motion="reduce") as page:
        for step in range(4):
            if step == 1:
                page.choose(*images)
                page.page.fill("#question", "w" * 300)
            elif step == 2:
                page.page.press("#question", "Enter")
                page.answer()
                page.ask("strange")
                page.choose(images[0])
            elif step == 3:
                page.page.click("#open-settings")
            found = Axe().run(page.page)
            assert found.violations_count == 0, found.generate_report()
            assert page.page.evaluate("document.documentElement.scrollWidth") == width


def test_images_and_answers_are_announced(page: Visit, images: list[Path]) -> None:
    page.choose(images[0])
    page.ask("What?")
    answer = page.page.locator(".answer")
    assert answer.get_attribute("aria-live") == "polite"
    assert answer.get_attribute("aria-busy") == "false"
    assert page.page.locator(".asked img").get_attribute("alt") == "red.png"
