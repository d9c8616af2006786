"""vila-chat as a person uses it: in a pseudo-terminal, with keys as a terminal sends them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pytest
from PIL import Image

from tests.support.chain import answering_checkpoint
from tests.support.commands import BIN, succeed
from tests.support.pseudo_terminal import (
    CTRL_C,
    CTRL_D,
    ENTER,
    PASTE,
    PROMPT,
    TAB,
    UP,
    Terminal,
    terminal,
)
from vila_deploy.cli import chat_interactive
from vila_deploy.cli.chat_lines import CtrlC, LineReader

SHORT = ("--max-new-tokens", "3")
AT_PROMPT = "/exit or Ctrl-D ends the chat"


class Start(Protocol):
    def __call__(self, *options: str, **more: str) -> AbstractContextManager[Terminal]: ...


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers "abcabcabc…" without end, some thousand tokens."""
    folder = tmp_path_factory.mktemp("terminal")
    tokens = [3 + byte for byte in b"abca"]
    root = answering_checkpoint(folder / "c", tokens, max_length=65536)
    lengths = ("--max-input-len", 256, "--max-seq-len", 65536)
    succeed("vila-build-engine", root, "--target", "cpu", *lengths, "-o", folder / "e")
    return folder / "e"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with two images, one of them with a space in its name."""
    for name in ("red.png", "my cat.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def start(engine: Path, home: Path) -> Start:
    return lambda *options, **more: terminal(BIN / "vila-chat", engine, *options, home=home, **more)


@pytest.fixture
def short(start: Start) -> Iterator[Terminal]:
    """A chat with answers of three tokens, at its first prompt."""
    with start(*SHORT) as chat:
        chat.wait_for(PROMPT)
        yield chat


def history(home: Path) -> list[str]:
    path = home / ".local" / "state" / "vila-deploy" / "chat-history.jsonl"
    return list(map(json.loads, path.read_text("utf-8").splitlines())) if path.exists() else []


def test_ctrl_c_ends_the_answer_and_not_the_chat(start: Start) -> None:
    with start("--max-new-tokens", "60000") as chat:
        for keys in (CTRL_C, CTRL_C * 5):
            chat.wait_for(PROMPT)
            chat.enter("What?")
            chat.wait_for("abcabc")
            chat.type(keys)
            chat.wait_for("(stopped)")
        # Whatever a step was at when the last one came.
        chat.wait_for(PROMPT)
        chat.enter("/reset")
        chat.enter("What?")
        assert "\nabcabcabc" in chat.wait_for("abcabcabc").replace("\r", "\n")
        chat.type(CTRL_C)
        chat.wait_for(PROMPT)
        chat.enter("/exit")
        assert chat.ends() == 0


def test_ctrl_c_behind_a_stopped_answer_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a person who keeps pressing it."""
    lines, shown, echo = iter(["What?", "/exit"]), [], chat_interactive.click.echo

    class Reader(LineReader):
        def read(self, prompt: str) -> str:
            return next(lines)

    class Stopped(chat_interactive.Chat):
        def __init__(self) -> None:
            self.ended = False

        def do(self, text: str) -> None:
            self.ended = text == "/exit"
            if not self.ended:
                raise CtrlC

    def press_once_more(message: str, **options: bool) -> None:
        shown.append(message.strip())
        if message.strip() == chat_interactive.STOPPED:
            os.kill(os.getpid(), signal.SIGINT)
        echo(message, **options)

    monkeypatch.setattr(chat_interactive, "is_terminal", lambda: True)
    monkeypatch.setattr(chat_interactive, "LineReader", Reader)
    monkeypatch.setattr(chat_interactive.click, "echo", press_once_more)
    try:
        chat_interactive.converse(Stopped())
    except KeyboardInterrupt:
        pytest.fail("the chat has ended")
    assert shown[1:] == [chat_interactive.STOPPED]


def test_a_stopped_answer_stays_in_the_conversation(start: Start) -> None:
    with start("--max-new-tokens", "60000") as chat:
        chat.wait_for(PROMPT)
        chat.enter("What?")
        chat.wait_for("abc" * 100)
        chat.type(CTRL_C)
        chat.wait_for("(stopped)")
        chat.enter("And now?")
        assert "the prompt takes" in chat.wait_for("begin anew with /reset")


@pytest.mark.parametrize("readline", [True, False])
def test_ctrl_c_and_ctrl_d_at_the_prompt(start: Start, home: Path, readline: bool) -> None:
    if not readline:
        (home / "readline.py").write_text("raise ImportError")

    with start(PYTHONPATH="" if readline else str(home)) as chat:
        for _ in range(2):
            chat.wait_for(PROMPT)
            chat.type("thrown away")
            chat.press(CTRL_C, AT_PROMPT)
        chat.wait_for(PROMPT)
        chat.type(CTRL_D)
        assert chat.ends() == 0
    assert history(home) == []


@pytest.mark.parametrize("mode", ["emacs", "vi"])
def test_each_ctrl_c_at_the_prompt_counts(start: Start, home: Path, mode: str) -> None:
    (home / "inputrc").write_text(f"set editing-mode {mode}\n")
    with start(INPUTRC=str(home / "inputrc")) as chat:
        for number in range(20):
            chat.wait_for(PROMPT)
            chat.type("thrown away " * 100 + ("\x1b" if mode == "vi" and number % 2 else ""))
            # While readline reads all these keys.
            time.sleep(0.002)
            chat.type(CTRL_C)
            chat.wait_for(AT_PROMPT)
        chat.enter("/exit")
        assert chat.ends() == 0


def test_errors_do_not_end_the_chat(short: Terminal) -> None:
    for line in ("/image nowhere.png", "/what", "/image", "<image> What?"):
        short.enter(line)
        short.wait_for("error: ")
    for _ in range(20):
        short.enter("word " * 40)
        if "/reset" in short.wait_for(PROMPT):
            break
    short.enter("/reset")
    short.wait_for(PROMPT)
    short.enter("What?")
    short.wait_for("abc")


def test_sigterm_ends_the_chat(start: Start) -> None:
    with start("--max-new-tokens", "60000") as chat:
        chat.wait_for(PROMPT)
        # Python sees a signal that comes just before it waits for a key only with that key.
        chat.wait_for_sleep()
        chat.signal(signal.SIGTERM)
        assert chat.ends() == 130


def test_lines_pasted_together_are_one_question(short: Terminal, home: Path) -> None:
    short.type(PASTE.format("What is\rthis?"))
    short.type(ENTER)
    short.wait_for("abc")
    assert short.shown.count("abc") == 1
    assert history(home) == ["What is\nthis?"]


def test_alt_enter_begins_another_line(short: Terminal, home: Path) -> None:
    short.type("What is\x1b\rthis?" + ENTER)
    short.wait_for("abc")
    assert history(home) == ["What is\nthis?"]


def test_a_command_pasted_with_its_question(short: Terminal, home: Path) -> None:
    short.type(PASTE.format(f"/image {home}/red.png\r<image> What?") + ENTER)
    short.wait_for("for the next question: 1 image")
    short.wait_for("abc")


def test_lines_are_edited_and_remembered(start: Start, home: Path) -> None:
    with start(*SHORT) as chat:
        chat.wait_for(PROMPT)
        chat.type("Wat?" + "\x1b[D" * 3 + "h" + ENTER)
        chat.wait_for("abc")
        chat.enter("Who?")
        chat.wait_for("abc")
        chat.enter("Who?")
        chat.wait_for("abc")
    assert history(home) == ["What?", "Who?"]
    with start(*SHORT) as chat:
        chat.wait_for(PROMPT)
        chat.type(UP + UP + ENTER)
        chat.wait_for("abc")
    assert history(home) == ["What?", "Who?", "What?"]


def test_history_is_private_and_keeps_no_binary(short: Terminal, home: Path) -> None:
    for keys in (PASTE.format("\x89PNG\x16\x01\x02"), PASTE.format("\udcff\udcfe"), "Fine?"):
        short.type(keys + ENTER)
        short.wait_for(PROMPT)
    assert history(home) == ["Fine?"]
    folder = home / ".local" / "state" / "vila-deploy"
    assert (folder / "chat-history.jsonl").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_history_follows_xdg_and_damage_is_harmless(start: Start, home: Path) -> None:
    folder = home / "state" / "vila-deploy"
    folder.mkdir(parents=True)
    lines = ['"first"', "no JSON", "7", '"\\u0007bell"', '"last"', '"cut sh']
    (folder / "chat-history.jsonl").write_text("\n".join(lines) + "\n")
    with start(*SHORT, XDG_STATE_HOME=str(home / "state")) as chat:
        chat.wait_for(PROMPT)
        chat.type(UP + UP + ENTER)
        chat.wait_for("abc")
    entries = (folder / "chat-history.jsonl").read_text().splitlines()
    assert entries[-1] == '"first"'


def test_a_chat_without_a_place_for_its_history(start: Start, home: Path) -> None:
    (home / ".local").write_text("no folder")
    # A relative path counts for nothing.
    with start(*SHORT, XDG_STATE_HOME="relative") as chat:
        chat.wait_for(PROMPT)
        chat.enter("What?")
        chat.wait_for("abc")
    assert not Path("relative").exists()


def test_image_takes_quotes_home_and_several_files(short: Terminal, home: Path) -> None:
    for argument, count in (
        (f"{home}/red.png", "1 image"),
        ("~/red.png", "2 images"),
        ('"~/my cat.png"', "3 images"),
        (f"'{home}/my cat.png' ~/red.png", "5 images"),
        (f"{home}/my\\ cat.png", "6 images"),
        (f"{home}/my cat.png", "7 images"),
        (f"{home}/red.png {home}/nowhere.png", None),
        ("'not closed", None),
        ("~nobody-of-this-name/red.png", None),
    ):
        short.enter(f"/image {argument}")
        short.wait_for(f"next question: {count}" if count else "error: ")
    short.enter("<image> What?")
    short.wait_for("1 <image> markers for 7 images")


def test_tab_completes_commands_and_files(short: Terminal, home: Path) -> None:
    short.type("/im" + TAB + f"{home}/re" + TAB)
    short.wait_for("red.png ")
    short.type(ENTER)
    short.wait_for("for the next question: 1 image")


def test_answers_go_to_a_file_and_the_rest_does_not(
    engine: Path, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.txt"
    with terminal(BIN / "vila-chat", engine, *SHORT, home=home, stdout=out) as chat:
        chat.wait_for(PROMPT)
        chat.enter("What?")
        chat.wait_for(PROMPT)
        chat.enter("/exit")
        assert chat.ends() == 0
    assert out.read_bytes() == b"abc\n"


def test_system_stop_and_help(start: Start) -> None:
    with start("--system", "Be brief.", "--stop", "zzz", "--stop", "ca") as chat:
        chat.wait_for(PROMPT)
        chat.enter("/help")
        chat.wait_for("/reset begins anew")
        chat.enter("What?")
        assert chat.wait_for(PROMPT)
        assert "ab\r\n" in chat.wait_for(PROMPT)
