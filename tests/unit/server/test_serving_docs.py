"""What README and docs/serving.md say of the server: their requests run, and no name is missing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.support.documents import blocks, commands
from tests.support.paths import REPOSITORY
from tests.support.serving import NAME, Running, asks
from vila_deploy.server.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS

PAGE = REPOSITORY / "docs" / "serving.md"
TEXT = PAGE.read_text("utf-8")


def test_python(
    server: Running,
    images: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images[0].save("cat.jpg")
    (block,) = blocks(PAGE, "python")
    code = block.text.replace("http://127.0.0.1:8000", server.url).replace("vila-3b-cpu", NAME)
    exec(compile(code, str(block), "exec"), {})
    messages = [asks("What is this?", Image.open("cat.jpg").convert("RGB"))]
    assert capsys.readouterr().out.strip(), messages


def test_curl(server: Running) -> None:
    lines = [
        command.line
        for page in (REPOSITORY / "README.md", PAGE)
        for block in blocks(page, "console")
        for command in commands(block)
        if command.line.startswith("curl ")
    ]
    assert lines
    for line in lines:
        _, url, *options = shlex.split(line)
        headers = dict(options[i + 1].split(": ", 1) for i, o in enumerate(options) if o == "-H")
        body = options[options.index("-d") + 1]
        path = url.removeprefix("localhost:8000")
        response = server.http().post(path, content=body, headers=headers)
        assert response.status_code == 200, response.text
        json.loads(body)


@pytest.mark.parametrize("name", sorted(CHAT_FIELDS | COMPLETION_FIELDS - {"prompt"}))
def test_every_field_is_explained(name: str) -> None:
    assert f"`{name}" in TEXT


def test_every_metric_is_explained(server: Running) -> None:
    text = server.http().get("/metrics").text
    found = re.findall(r"^# TYPE vila:(\w+) ", text, re.M)
    names = {name for name in found if not name.endswith("_created")}
    shown = set(re.findall(r"`(\w+)(?:\{[\w,]+\})?`", TEXT[TEXT.index("## Metrics") :]))
    assert names <= shown
