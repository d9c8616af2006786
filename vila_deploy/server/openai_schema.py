"""Requests of OpenAI's API: JSON in, checked dataclasses out; every error names its field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from vila_deploy.server.errors import ApiError
from vila_deploy.server.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS, RequestFields
from vila_deploy.utils.errors import short

MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_TOKENS = (1 << 31) - 1
MAX_SEED = (1 << 63) - 1
MAX_TOP_LOGPROBS, MAX_COMPLETION_LOGPROBS = 20, 5
# A JSON text of this many parts takes far more memory than its bytes.
MAX_JSON_PARTS = 200_000
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImagePart:
    """The URL of an image, not fetched yet; `param` is where it stands in the request."""

    url: str
    param: str


@dataclass(frozen=True)
class VideoPart:
    """The frames of a video, in order."""

    frames: tuple[ImagePart, ...]


Part = str | ImagePart | VideoPart


@dataclass(frozen=True)
class ChatMessage:
    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ResponseFormat:
    """What the answer must be: `schema` is the text of a JSON schema."""

    schema: str


@dataclass(frozen=True)
class GenerationOptions:
    """How to answer; fields as in OpenAI's API.

    Args:
        max_tokens: None: as many as fit.
        seed: None draws anew each time.
        logprobs: None: none; else how many likely tokens to name beside each token.
        response_format: None for free text.
        ignore_eos: go on to max_tokens whatever the model says, for load tests.
    """

    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class ChatRequest:
    messages: tuple[ChatMessage, ...]
    options: GenerationOptions

    @property
    def images(self) -> list[ImagePart]:
        """All images and frames, in the order of the prompt."""
        found: list[ImagePart] = []
        for message in self.messages:
            for part in message.parts:
                if isinstance(part, ImagePart):
                    found.append(part)
                elif isinstance(part, VideoPart):
                    found += part.frames
        return found


@dataclass(frozen=True)
class CompletionRequest:
    prompt: str
    options: GenerationOptions


def parse_json(body: bytes) -> RequestFields:
    """Return the JSON object in `body`.

    Raises:
        ApiError: not JSON, not an object, too deep, too many parts, or NaN and the like.
    """
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_JSON_PARTS:
        raise ApiError(f"the JSON has more than {MAX_JSON_PARTS} parts", fix="send less")
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ApiError("the body is not valid JSON", fix="send one JSON object in UTF-8") from None
    if not isinstance(value, dict):
        raise ApiError("the body is no JSON object", fix='send an object such as {"messages": …}')
    return RequestFields(value)


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def parse_chat(fields: RequestFields, ignore_tools: bool = False) -> ChatRequest:
    """Return a request of /v1/chat/completions.

    Args:
        ignore_tools: see `RequestFields.check_known`.
    """
    fields.check_known(CHAT_FIELDS, ignore_tools)
    wants = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", 0, low=0, high=MAX_TOP_LOGPROBS)
    if top and not wants:
        raise fields.error("top_logprobs", "is given without logprobs", "set logprobs to true")
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    options = _options(fields, _optional_integer(fields, name, MAX_TOKENS), top if wants else None)
    return ChatRequest(_messages(fields), options)


def parse_completion(fields: RequestFields) -> CompletionRequest:
    """Return a request of /v1/completions."""
    fields.check_known(COMPLETION_FIELDS)
    logprobs = None
    if "logprobs" in fields:
        logprobs = fields.integer("logprobs", low=0, high=MAX_COMPLETION_LOGPROBS)
    prompt = fields.values.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise fields.error("prompt", f"must be one string, found {short(prompt)}")
    tokens = fields.integer("max_tokens", COMPLETION_TOKENS, high=MAX_TOKENS)
    return CompletionRequest(_text(fields, "prompt", prompt), _options(fields, tokens, logprobs))


def _options(
    fields: RequestFields, max_tokens: int | None, logprobs: int | None
) -> GenerationOptions:
    stream = fields.boolean("stream", False)
    include_usage = False
    if "stream_options" in fields:
        if not stream:
            raise fields.error("stream_options", "is given without stream", "set stream to true")
        stream_options = fields.child("stream_options")
        include_usage = stream_options.boolean("include_usage", False)
    top_p = fields.number("top_p", 1.0, high=1.0)
    if top_p == 0:
        raise fields.error("top_p", "must be above 0")
    penalty = fields.number("repetition_penalty", 1.0, high=10.0)
    if penalty == 0:
        raise fields.error("repetition_penalty", "must be above 0")
    return GenerationOptions(
        model=fields.text("model") if "model" in fields else None,
        stream=stream,
        include_usage=include_usage,
        max_tokens=max_tokens,
        temperature=fields.number("temperature", 0.0, high=2.0),
        top_p=top_p,
        top_k=max(0, fields.integer("top_k", 0, low=-1)),
        repetition_penalty=penalty,
        seed=_seed(fields),
        stop=_stops(fields),
        logprobs=logprobs,
        response_format=_response_format(fields),
        ignore_eos=fields.boolean("ignore_eos", False),
    )


def _optional_integer(fields: RequestFields, key: str, high: int) -> int | None:
    return fields.integer(key, high=high) if key in fields else None


def _seed(fields: RequestFields) -> int | None:
    if "seed" not in fields:
        return None
    # OpenAI takes 64 bits with a sign; numpy's generators take no negative seed.
    return fields.integer("seed", low=-MAX_SEED - 1, high=MAX_SEED) & ((1 << 64) - 1)


def _stops(fields: RequestFields) -> tuple[str, ...]:
    value = fields.values.get("stop")
    stops = value if isinstance(value, list) else [] if value is None else [value]
    if len(stops) > MAX_STOPS:
        raise fields.error("stop", f"holds {len(stops)} strings, at most {MAX_STOPS} are allowed")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            what = f"must hold strings of 1 to {MAX_STOP_CHARACTERS} characters"
            raise fields.error("stop", f"{what}, found {short(stop)}")
        _text(fields, "stop", stop)
    return tuple(stops)


def _response_format(fields: RequestFields) -> ResponseFormat | None:
    if "response_format" not in fields:
        return None
    wanted = fields.child("response_format")
    kind = wanted.choice("type", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat('{"type": "object"}')
    schema = wanted.child("json_schema").child("schema").values
    return ResponseFormat(json.dumps(schema))


def _messages(fields: RequestFields) -> tuple[ChatMessage, ...]:
    value = fields.values.get("messages")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise fields.error("messages", f"must be a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_message(item, f"messages[{number}]") for number, item in enumerate(value))


def _message(value: Any, where: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise ApiError(f"must be an object, found {short(value)}", param=where)
    fields = RequestFields(value, prefix=f"{where}.")
    given = fields.text("role")
    if given not in ROLES:
        raise fields.error(
            "role", f"{short(given)} is not supported", f"use {', '.join(sorted(ROLES))}"
        )
    for key in ("tool_calls", "function_call", "audio"):
        if value.get(key):
            raise fields.error(key, "is not supported", "remove it")
    role: Role = ROLES[given]  # type: ignore[assignment]
    parts = _content(fields)
    if role != "user" and not all(isinstance(part, str) for part in parts):
        raise fields.error("content", f"has an image, and role {given} can't", "use role user")
    return ChatMessage(role, parts)


def _content(fields: RequestFields) -> tuple[Part, ...]:
    content = fields.values.get("content")
    if isinstance(content, str):
        return (_text(fields, "content", content),)
    if not isinstance(content, list) or len(content) > MAX_PARTS:
        raise fields.error(
            "content", f"must be a string or up to {MAX_PARTS} parts, found {short(content)}"
        )
    return tuple(_part(item, f"{fields.prefix}content[{i}]") for i, item in enumerate(content))


def _part(value: Any, where: str) -> Part:
    if not isinstance(value, dict):
        raise ApiError(f"must be an object, found {short(value)}", param=where)
    fields = RequestFields(value, prefix=f"{where}.")
    kind = fields.choice("type", ("text", "refusal", "image_url", "video_url"), what="type")
    if kind in ("text", "refusal"):
        return _text(fields, kind, fields.text(kind))
    url, param = _url(fields, kind), f"{where}.{kind}"
    if kind == "image_url":
        return ImagePart(url, param)
    return VideoPart(_frames(url, param))


def _url(fields: RequestFields, kind: str) -> str:
    """Return the URL of a part; some clients send it without the object around it."""
    if isinstance(fields.values.get(kind), str):
        return fields.text(kind)
    holder = fields.child(kind)
    # The model sees every image as it was trained to, whatever the detail.
    holder.choice("detail", ("auto", "low", "high", "original"), "auto")
    return holder.text("url")


def _frames(url: str, param: str) -> tuple[ImagePart, ...]:
    """Split data:video/jpeg;base64,FRAME,FRAME,…, the form that vLLM takes frames in."""
    head, _, frames = url.partition(",")
    if head != "data:video/jpeg;base64" or not frames:
        raise ApiError(
            "is no list of frames",
            param=param,
            fix="send data:video/jpeg;base64,FRAME,FRAME,… where each FRAME is a JPEG in base64",
        )
    prefix = "data:image/jpeg;base64,"
    return tuple(ImagePart(f"{prefix}{frame}", param) for frame in frames.split(","))


def _text(fields: RequestFields, key: str, value: str) -> str:
    """Return `value`; lone surrogates are in no encoding, and no tokenizer takes them."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise fields.error(key, "holds half a character (a lone surrogate)") from None
    return value
