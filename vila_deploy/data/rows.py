"""Read rows of .jsonl and .json: our own keys, or conversations as LLaVA and VILA are tuned on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.placeholders import IMAGE_PLACEHOLDERS, VIDEO_PLACEHOLDERS
from vila_deploy.utils.errors import VilaDeployError, short

ROW_KEYS = ("text", "answer", "image")
CONVERSATIONS = "conversations"
# `from` of a message; ShareGPT's names are the second ones.
QUESTION_ROLES, ANSWER_ROLES = ("human", "user"), ("gpt", "assistant")
FIX = (
    'write rows {"text": …} with "answer" and "image" if wanted, or of LLaVA\'s form: '
    '{"image": …, "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}]}'
)


@dataclass(frozen=True)
class Row:
    """A conversation: questions, an answer to each but perhaps the last, and paths of images."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    images: tuple[str, ...]


def rows_of_lines(content: str, path: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl file.

    Raises:
        VilaDeployError: a line is not JSON or no row.
    """
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            yield _row(_parse(line, where), where)


def rows_of_list(content: str, path: Path) -> Iterator[Row]:
    """Yield the rows of a .json file, which holds one list.

    Raises:
        VilaDeployError: it is not JSON, no list, or an element is no row.
    """
    rows = _parse(content, str(path))
    if not isinstance(rows, list):
        raise _error(f"must hold a list of rows, found {short(rows)}", str(path))
    for number, value in enumerate(rows, 1):
        yield _row(value, f"{path}: row {number}")


def _error(what: str, where: str) -> VilaDeployError:
    return VilaDeployError(what, where=where, fix=FIX)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise _error("is not valid JSON", where) from problem


def _row(value: Any, where: str) -> Row:
    """Return a row in either form, with <image> for every kind of image placeholder.

    Raises:
        VilaDeployError: a key is missing, unknown or of another type; the number of markers is
            neither 0 nor that of the images; or there is a video's placeholder.
    """
    is_conversation = isinstance(value, dict) and CONVERSATIONS in value
    row = (_conversation if is_conversation else _own_form)(value, where)
    for text in (*row.questions, *row.answers):
        for placeholder in VIDEO_PLACEHOLDERS:
            if placeholder in text:
                raise _video_error(placeholder, where)
    questions, answers = (tuple(map(_with_markers, t)) for t in (row.questions, row.answers))
    row = Row(questions, answers, row.images)
    markers = sum(question.count(IMAGE_MARKER) for question in row.questions)
    in_answers = any(IMAGE_MARKER in answer for answer in row.answers)
    if markers not in (0, len(row.images)) or in_answers:
        raise _error(
            f"has {markers} {IMAGE_MARKER} markers for {len(row.images)} images"
            + " and some in answers" * in_answers,
            where,
        )
    return row


def _with_markers(text: str) -> str:
    for placeholder in IMAGE_PLACEHOLDERS:
        text = text.replace(placeholder, IMAGE_MARKER)
    return text


def _video_error(found: str, where: str) -> VilaDeployError:
    return VilaDeployError(
        f"has a {found}: only texts and images are calibrated on",
        where=where,
        fix="leave out rows with videos, or give some of their frames as images",
    )


def _own_form(value: Any, where: str) -> Row:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise _error(f"must be an object with a string `text`, found {short(value)}", where)
    unknown = sorted(set(value) - set(ROW_KEYS))
    if unknown:
        raise _error(f"unknown key {short(unknown[0])}", where)
    answer = value.get("answer")
    if not (answer is None or isinstance(answer, str)):
        raise _error(f"answer must be a string, found {short(answer)}", where)
    answers = () if answer is None else (_unicode(answer),)
    return Row((_unicode(value["text"]),), answers, _image_names(value.get("image"), where))


def _conversation(value: dict[str, Any], where: str) -> Row:
    """Return a row of LLaVA's form; other keys, such as `id`, say nothing about the text."""
    for key in ("video", "videos"):
        if value.get(key):
            raise _video_error(key, where)
    messages = value[CONVERSATIONS]
    if not isinstance(messages, list) or not messages:
        raise _error(f"{CONVERSATIONS} must be a list of messages", where)
    pairs = [_message(message, where) for message in messages]
    # The originals' training leaves out what comes before the first question, a system prompt.
    if pairs[0][0] not in QUESTION_ROLES:
        pairs = pairs[1:]
    for number, (role, _) in enumerate(pairs):
        if role not in (ANSWER_ROLES if number % 2 else QUESTION_ROLES):
            raise _error(
                f"{CONVERSATIONS} must alternate between human and gpt, found {short(role)} as "
                f"message {number + 1}",
                where,
            )
    if not pairs:
        raise _error(f"{CONVERSATIONS} holds no question", where)
    texts = [text for _, text in pairs]
    images = value.get("image") or value.get("images")
    return Row(tuple(texts[::2]), tuple(texts[1::2]), _image_names(images, where))


def _message(message: Any, where: str) -> tuple[str, str]:
    fields = message if isinstance(message, dict) else {}
    role, text = fields.get("from"), fields.get("value")
    if not isinstance(role, str) or not isinstance(text, str):
        raise _error(
            f"a message must have strings `from` and `value`, found {short(message)}", where
        )
    return role, _unicode(text)


def _image_names(image: Any, where: str) -> tuple[str, ...]:
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise _error(f"image must be a path or a list of paths, found {short(image)}", where)
    return tuple(names)


def _unicode(text: str) -> str:
    """Return `text` without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
