"""Requests of OpenAI's API: what is read, what is accepted without effect, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vila_deploy.server.errors import ApiError
from vila_deploy.server.openai_fields import CHAT_FIELDS, IGNORED, NEUTRAL, RequestFields
from vila_deploy.server.openai_schema import (
    MAX_JSON_PARTS,
    ChatRequest,
    ImagePart,
    VideoPart,
    parse_chat,
    parse_completion,
    parse_json,
)

PNG = "data:image/png;base64,AAAA"


def chat(**fields: Any) -> ChatRequest:
    fields = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return parse_chat(parse_json(json.dumps(fields).encode()))


def problem(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_defaults_are_greedy_and_free() -> None:
    options = chat().options
    assert (options.temperature, options.top_p, options.max_tokens) == (0.0, 1.0, None)
    assert (options.stop, options.logprobs, options.response_format) == ((), None, None)
    assert not options.stream


def test_all_supported_fields() -> None:
    options = chat(
        model="m", stream=True, stream_options={"include_usage": True}, max_completion_tokens=7,
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=-1, repetition_penalty=1.1, seed=-1,
        stop="x", logprobs=True, top_logprobs=3, response_format={"type": "json_object"},
    ).options  # fmt: skip
    assert options.model == "m"
    assert options.stream
    assert options.include_usage
    assert options.max_tokens == 7, "the newer name counts"
    assert (options.temperature, options.top_p, options.top_k) == (0.5, 0.9, 0)
    assert options.seed == (1 << 64) - 1
    assert options.stop == ("x",)
    assert options.logprobs == 3
    assert options.response_format is not None
    assert json.loads(options.response_format.schema) == {"type": "object"}
    assert chat(max_tokens=9).options.max_tokens == 9
    assert chat(logprobs=True).options.logprobs == 0


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_neutral_values_are_accepted_and_others_refused_by_name(name: str) -> None:
    for value in (*NEUTRAL[name], None):
        chat(**{name: value})
    error = problem(**{name: {"other": 1}})
    assert error.param == name
    assert "is not supported" in str(error)


def test_offers_of_tools_may_be_passed_over() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    error = problem(tools=[tool])
    assert error.param == "tools"
    assert "--ignore-tools" in str(error)
    fields = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    for choice in (None, "auto", "none"):
        parse_chat(RequestFields({**fields, "tool_choice": choice}), ignore_tools=True)
    for wanted in ("required", {"type": "function", "function": {"name": "now"}}):
        with pytest.raises(ApiError, match="tool_choice"):
            parse_chat(RequestFields({**fields, "tool_choice": wanted}), ignore_tools=True)


def test_false_is_not_zero() -> None:
    assert problem(presence_penalty=False).param == "presence_penalty"


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_fields_without_effect(name: str) -> None:
    chat(**{name: "anything"})


def test_a_misspelt_field_is_refused() -> None:
    error = problem(temprature=1)
    assert error.param == "temprature"
    assert "is no field of this API" in str(error)


def test_null_is_as_if_left_out() -> None:
    assert chat(**dict.fromkeys(CHAT_FIELDS - {"messages"})) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**31), ("max_tokens", 1.5),
        ("max_tokens", True), ("max_tokens", "5"), ("max_completion_tokens", -5),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "0"), ("temperature", 1e400),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("top_k", 0.5), ("repetition_penalty", 0),
        ("repetition_penalty", -1), ("seed", 2**63), ("seed", "x"), ("stop", ""), ("stop", 5),
        ("stop", ["a"] * 17), ("stop", ["a" * 257]), ("stop", ["\ud800"]), ("stream", "true"),
        ("stream_options", {"include_usage": True}), ("top_logprobs", 1), ("logprobs", 1),
        ("model", 5), ("response_format", "json"), ("messages", []), ("messages", "Hi"),
        ("messages", None), ("messages", [{"role": "user", "content": ""}] * 1025),
    ],
)  # fmt: skip
def test_numbers_and_types_have_bounds(name: str, value: Any) -> None:
    if value == 1e400:
        with pytest.raises(ApiError, match="not valid JSON"):
            chat(**{name: value})
        return
    error = problem(**{name: value})
    assert (error.param or "").startswith(name)


def test_top_logprobs_needs_logprobs_and_has_a_bound() -> None:
    assert problem(logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert problem(logprobs=False, top_logprobs=2).param == "top_logprobs"


def test_messages_of_every_role() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "x"},
            {"role": "assistant", "content": "b", "tool_calls": [], "refusal": None},
            {"role": "user", "content": "c"},
        ]
    )
    assert [(m.role, m.parts) for m in request.messages] == [
        ("system", ("Be brief.",)),
        ("user", ("a",)),
        ("assistant", ("b",)),
        ("user", ("c",)),
    ]


def test_images_and_video_frames() -> None:
    request = chat(
        messages=user(
            {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}},
            {"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}},
            {"type": "image_url", "image_url": PNG},
            {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AA==,BB=="}},
        )
    )
    image, text, bare, video = request.messages[0].parts
    assert image == ImagePart(PNG, "messages[0].content[0].image_url")
    assert text == "What?"
    assert isinstance(bare, ImagePart)
    assert isinstance(video, VideoPart)
    assert [frame.url for frame in video.frames] == [
        "data:image/jpeg;base64,AA==",
        "data:image/jpeg;base64,BB==",
    ]
    assert len(request.images) == 4


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (5, "messages[0]"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "audio"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
         "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].image_url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
         "messages[0].content[0].image_url.url"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]},
         "messages[0].content[0].image_url.url"),
        ({"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a.mp4"}}]},
         "messages[0].content[0].video_url"),
        ({"role": "system", "content": [{"type": "image_url", "image_url": PNG}]},
         "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
         "messages[0].tool_calls"),
    ],
)  # fmt: skip
def test_wrong_messages_name_their_place(message: Any, param: str) -> None:
    assert problem(messages=[message]).param == param


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b'{"a": NaN}', b'{"a": Infinity}',
        b"[" * 100_000 + b"]" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\x00"}',
    ],
)  # fmt: skip
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400


def test_json_of_too_many_parts() -> None:
    body = b'{"metadata": [' + b"[]," * MAX_JSON_PARTS + b"0]}"
    with pytest.raises(ApiError, match="parts"):
        parse_json(body)


def completion(**fields: Any) -> Any:
    return parse_completion(RequestFields(fields))


def test_completions() -> None:
    request = completion(prompt="Once", logprobs=2, echo=False, best_of=1, suffix="")
    assert request.prompt == "Once"
    assert request.options.logprobs == 2
    assert request.options.max_tokens == 16, "OpenAI's default"
    assert completion(prompt=["Once"]).prompt == "Once"
    for wrong in (None, [], ["a", "b"], [1, 2], 5):
        with pytest.raises(ApiError, match="must be one string"):
            completion(prompt=wrong)
    for name, value in (("echo", True), ("suffix", "x"), ("best_of", 2), ("messages", [1])):
        with pytest.raises(ApiError) as caught:
            completion(prompt="x", **{name: value})
        assert caught.value.param == name


def test_error_in_the_form_of_the_api() -> None:
    error = problem(n=2)
    assert error.body() == {
        "error": {
            "message": "n: 2 is not supported; remove it or give 1",
            "type": "invalid_request_error",
            "param": "n",
            "code": None,
        }
    }


def test_fields_that_vllm_router_writes_into_every_request() -> None:
    """As vllm-router 0.1.17 sends them on."""
    written = {
        "logprobs": False, "no_stop_trim": False, "ignore_eos": False,
        "continue_final_message": False, "skip_special_tokens": True, "separate_reasoning": True,
        "stream_reasoning": True, "return_hidden_states": False, "include_reasoning": True,
    }  # fmt: skip
    messages = [{"role": "user", "content": "x"}]
    assert parse_chat(RequestFields({"messages": messages, **written})).options.logprobs is None
