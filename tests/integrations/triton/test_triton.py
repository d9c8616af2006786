"""Our engine in Triton's own server: streams equal answers, metrics count them."""

from __future__ import annotations

import base64
import json
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import TINY_VILA
from tests.support.triton_server import Server, joined, needs_triton, triton_server
from vila_deploy import SamplingParams, open_engine
from vila_deploy.integrations.triton.repository import write_repository

IMAGE = TINY_VILA.parent / "pictures" / "three.png"
QUESTION = "Describe the picture."
pytestmark = needs_triton


@pytest.fixture(scope="module")
def expected(engine: Path) -> str:
    with open_engine(engine) as opened:
        answer = opened.chat().ask(QUESTION, images=[IMAGE], sampling=SamplingParams(64))
    return answer.text


@pytest.fixture(scope="module")
def server(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    write_repository(engine, folder / "models")
    with triton_server(folder, folder / "models") as found:
        yield found


def body(**more: Any) -> dict[str, Any]:
    image = base64.b64encode(IMAGE.read_bytes()).decode()
    return {"text_input": QUESTION, "image": image, "max_tokens": 64, **more}


def test_a_stream_is_the_answer_in_pieces(server: Server, expected: str) -> None:
    responses = server.generate(**body())
    assert joined(responses).strip() == expected
    assert len(responses) > 2
    assert responses[-1]["finish_reason"] == "stop"
    assert not any(response["finish_reason"] for response in responses[:-1])


def test_one_response_where_no_stream_is_wanted(server: Server, expected: str) -> None:
    (response,) = server.generate("generate", **body(stream=False))
    assert response["text_output"].strip() == expected


def test_many_at_once_are_answered_alike_and_counted(server: Server, expected: str) -> None:
    before = server.requests_done()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: joined(server.generate(**body())).strip(), range(16)))
    assert answers == [expected] * 16
    assert server.requests_done() == before + 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_input": "What is <image>?"}, "which marks the place of an image"),
        ({"image": "!!"}, "image 0: is neither an image file nor base64"),
        ({"image": "aGVsbG8="}, "image 0: is not an image"),
        ({"max_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_a_bad_request_gets_one_line_and_hurts_nobody(
    server: Server, expected: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.generate("generate", **body(stream=False, **changes))
    assert message in json.loads(caught.value.read())["error"]
    assert joined(server.generate(**body())).strip() == expected
