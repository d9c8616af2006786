"""Requests as Open WebUI 0.12.4 sends them: its routers/openai.py, tasks.py, utils/payload.py.

Answers to a person are streamed with usage; titles, tags and follow-up questions are not. Where no
setting says otherwise, built-in tools are offered with each question.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from tests.support.serving import NAME, image_part

# What it adds where a person has set parameters of a model; others it sends only if set.
PARAMETERS = {
    "temperature": 0.0,
    "top_p": 1.0,
    "max_tokens": 24,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "seed": 42,
    "stop": ["\n\n"],
    "logit_bias": {},
    "top_k": 40,
    "min_p": 0.0,
}


def chat(image: Image.Image, **parameters: Any) -> dict[str, Any]:
    """Return the request of a question about an image, with a system prompt."""
    last = {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is at the left?"},
            # The last part may carry a hint for caches elsewhere.
            {**image_part(image), "cache_control": {"type": "ephemeral"}},
        ],
    }
    return {
        "stream": True,
        "model": NAME,
        "messages": [{"role": "system", "content": "Be brief."}, last],
        "stream_options": {"include_usage": True},
        "tools": TOOLS,
        **parameters,
    }


def follow_up(image: Image.Image, answer: str) -> dict[str, Any]:
    """Return the next question: the whole conversation again."""
    first = chat(image)
    turn = {"role": "assistant", "content": answer}
    return {**first, "messages": [*first["messages"], turn, {"role": "user", "content": "And?"}]}


def title(answer: str) -> dict[str, Any]:
    """Return the request for a title of the conversation, made of text alone."""
    history = f"<chat_history>\nASSISTANT: {answer}\n</chat_history>"
    prompt = f"### Task:\nGenerate a concise title.\n{history}"
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt}],
        "stream": False,
        "max_completion_tokens": 24,
    }


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_timestamp",
            "description": "Get the current time.",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
]
# Where no key is set, an empty one, one, and where users are forwarded.
HEADERS: tuple[dict[str, str], ...] = (
    {"Content-Type": "application/json"},
    {"Content-Type": "application/json", "Authorization": "Bearer"},
    {"Content-Type": "application/json", "Authorization": "Bearer None"},
    {
        "Content-Type": "application/json",
        "Authorization": "Bearer sk-anything",
        "X-OpenWebUI-User-Name": "Ann%20B",
        "X-OpenWebUI-User-Role": "admin",
    },
)
