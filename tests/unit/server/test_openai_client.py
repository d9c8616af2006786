"""OpenAI's own client, unmodified; each greedy answer is the one that vila-chat gives."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pydantic
import pytest
from PIL import Image

from tests.support.serving import (
    ENDLESS,
    NAME,
    Running,
    asks,
    chat_answers,
    data_uri,
    served_answers,
    wait_until,
)
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.runtime.open_engine import open_engine

Images = list[Image.Image]
COLORS = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue", "yellow"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}


def create(server: Running, messages: list[Any], **fields: Any) -> Any:
    return server.openai().chat.completions.create(
        model=NAME, messages=messages, **{"max_tokens": 40, **fields}
    )


def chat_turns(server: Running, turns: list[tuple[str, Images]]) -> list[str]:
    """Return what vila-chat answers, one turn after the other."""
    with open_engine(server.engine.folder) as engine:
        conversation = engine.chat()
        sampling = SamplingParams(max_new_tokens=40)
        return [conversation.ask(text, images, sampling).text for text, images in turns]


def test_models(server: Running) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "vila-deploy"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("gpt-5")


def test_answer_and_usage(server: Running, images: Images) -> None:
    answer = create(server, [asks("Describe the image.", images[0])])
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert [choice.message.content] == chat_turns(server, [("Describe the image.", images[:1])])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id in answer.id


def test_two_images_over_three_turns(server: Running, images: Images) -> None:
    turns = [("What is at the left?", images[:1]), ("And here?", images[1:2]), ("How many?", [])]
    expected = chat_turns(server, turns)
    messages: list[Any] = []
    for (text, shown), answer in zip(turns, expected, strict=True):
        messages.append(asks(text, *shown))
        reply = create(server, messages)
        assert reply.choices[0].message.content == answer
        messages.append({"role": "assistant", "content": answer})
    assert reply.usage.prompt_tokens_details.cached_tokens > 0, "nothing is computed twice"


def test_stream(server: Running, images: Images) -> None:
    messages = [asks("Describe the image.", images[1])]
    whole = create(server, messages)
    stream = create(server, messages, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 3, "piece by piece"
    *_, end, usage = chunks
    assert end.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_usage(server: Running) -> None:
    chunks = list(create(server, [asks("Hi")], stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_a_cancelled_stream_frees_its_slot(server: Running, images: Images) -> None:
    aborted = server.metric("request_success_total", finished_reason="abort")
    messages, options = [asks("Hi", images[0])], {"response_format": ENDLESS, "max_tokens": 1800}
    with create(server, messages, stream=True, **options) as stream:
        next(iter(stream))
        assert server.metric("num_requests_running") == 1
    wait_until(lambda: server.metric("num_requests_running") == 0)
    assert server.metric("request_success_total", finished_reason="abort") == aborted + 1


def test_logprobs(server: Running, images: Images) -> None:
    messages = [asks("Describe the image.", images[0])]
    answer = create(server, messages, logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    assert "".join(token.token for token in tokens).strip() == answer.message.content
    assert (
        b"".join(bytes(token.bytes) for token in tokens).decode().strip() == answer.message.content
    )
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert (
            token.top_logprobs[0].logprob
            == token.logprob
            == max(other.logprob for other in token.top_logprobs)
        )
        assert token.top_logprobs[0].token == token.token, "greedy takes the most likely"
    stream = create(server, messages, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        token
        for chunk in stream
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_json_schema(server: Running, images: Images) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": COLORS}}
    for image in images:
        messages = [asks("What colour?", image)]
        text = create(server, messages, response_format=wanted).choices[0].message.content
        value = json.loads(text)
        assert set(value) == {"color", "count"}
        assert value["color"] in COLORS["properties"]["color"]["enum"]
        assert type(value["count"]) is int


def test_json_object(server: Running) -> None:
    answer = create(
        server, [asks("Hi")], response_format={"type": "json_object"}, temperature=1, seed=3
    ).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.startswith("{")


def test_stop_strings_and_length(server: Running, images: Images) -> None:
    messages = [asks("Describe the image.", images[0])]
    whole = create(server, messages).choices[0].message.content
    word = whole.split()[2]
    cut = create(server, messages, stop=[word]).choices[0]
    assert cut.message.content == whole[: whole.index(word)].rstrip()
    assert cut.finish_reason == "stop"
    short = create(server, messages, max_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2


def test_seeds_make_draws_repeatable(server: Running) -> None:
    def draw(seed: int) -> str:
        options = {"temperature": 2, "seed": seed, "max_tokens": 12}
        return create(server, [asks("Hi")], **options).choices[0].message.content

    assert draw(5) == draw(5)
    assert len({draw(seed) for seed in (-1, 0, 1, 2, 3)}) > 1


def test_a_load_test_gets_as_many_tokens_as_it_asks_for(server: Running) -> None:
    answer = create(server, [asks("Hi")], max_tokens=60, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 60
    assert answer.choices[0].finish_reason == "length"


class Shape(pydantic.BaseModel):
    """What OpenAI's client turns into a schema, and an answer back into."""

    kind: Literal["circle", "square", "triangle"]
    sides: int = pydantic.Field(ge=0, le=9)
    inside: list[Dot] = pydantic.Field(max_length=2)


class Dot(pydantic.BaseModel):
    color: Literal["red", "blue"] | None


def test_a_pydantic_model_as_response_format(server: Running) -> None:
    answer = server.openai().chat.completions.parse(
        model=NAME, messages=[asks("Hi")], response_format=Shape, max_tokens=120
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)


def test_completions(server: Running) -> None:
    client = server.openai()
    whole = client.completions.create(model=NAME, prompt="USER: What", max_tokens=6, logprobs=2)
    assert whole.choices[0].text
    tokens = whole.choices[0].logprobs.tokens
    assert "".join(tokens) == whole.choices[0].text
    assert all(len(top) == 2 for top in whole.choices[0].logprobs.top_logprobs)
    stream = client.completions.create(model=NAME, prompt="USER: What", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_eight_at_once_answer_as_alone(server: Running, images: Images) -> None:
    questions = ["What is at the left?", "Describe the image.", "How many shapes are there?"]
    cases = [(text, [image]) for text in questions for image in images][:8]
    expected = chat_answers(server.engine.folder, cases, max_tokens=40)
    assert served_answers(server, cases, max_tokens=40, at_once=1) == expected
    assert served_answers(server, cases, max_tokens=40, at_once=8) == expected


def test_system_message_changes_the_prompt(server: Running) -> None:
    plain = create(server, [asks("Hi")])
    told = create(server, [{"role": "system", "content": "Be brief. " * 9}, asks("Hi")])
    assert told.usage.prompt_tokens != plain.usage.prompt_tokens


def test_video_as_frames(server: Running, images: Images) -> None:
    frames = ",".join(data_uri(image, "JPEG").partition(",")[2] for image in images)
    video = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]
    several = [asks("What happens?", *images)]
    assert (
        create(server, messages).usage.prompt_tokens == create(server, several).usage.prompt_tokens
    )
