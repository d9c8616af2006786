"""Progress as plain lines, the form that logs and tests see."""

import sys

import pytest

from vila_deploy.utils import progress
from vila_deploy.utils.progress import clock


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves by hand."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_lines_name_step_elapsed_and_eta(now, capsys):
    with progress.progress(4, "quantizing") as advance:
        advance("layer 1", 0)
        now[0] += 60
        advance("layer 2")
        advance("too soon")
        now[0] += 60
        advance("layer 4")
        advance()
    assert capsys.readouterr().err.splitlines() == [
        "quantizing 0/4, elapsed 0s (layer 1)",
        "quantizing 1/4, elapsed 1:00, ETA 3:00 (layer 2)",
        "quantizing 3/4, elapsed 2:00, ETA 40s (layer 4)",
        "quantizing 4/4, elapsed 2:00",
    ]


def test_a_day_of_work_gives_a_line_a_minute(now, capsys):
    with progress.progress(86400, "working") as advance:
        for _ in range(86400):
            now[0] += 1
            advance()
    assert 1400 < len(capsys.readouterr().err.splitlines()) < 1600


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress(2, "building") as advance:
        advance("[not markup]")
        advance()
    shown = capsys.readouterr().err
    assert "building" in shown
    assert "2/2" in shown


@pytest.mark.parametrize(("seconds", "text"), [(12.9, "12s"), (754, "12:34"), (4000, "1:06:40")])
def test_clock(seconds, text):
    assert clock(seconds) == text
