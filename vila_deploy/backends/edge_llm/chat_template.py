"""Write a prompt template as Jinja, for tools that render prompts themselves."""

from __future__ import annotations

import json

from vila_deploy.processing.chat_template import PromptTemplate


def jinja_of(template: PromptTemplate, prefix: str = "") -> str:
    """Return Jinja that renders `messages` of roles user and assistant as the model was trained.

    Args:
        prefix: text before the template's own.

    Other roles are left out: the system message is the template's own. Only statements that Inja,
    the C++ renderer of TensorRT-Edge-LLM, has too; all text is in string literals, since renderers
    drop different newlines around statements.
    """
    question = _text(template.user) + "{{ message.content }}" + _text(template.assistant)
    answer = _text(template.before_answer) + "{{ message.content }}" + _text(template.end_of_answer)
    return (
        f"{_text(prefix + template.system)}{{% for message in messages %}}"
        f'{{% if message.role == "user" %}}{question}{{% endif %}}'
        f'{{% if message.role == "assistant" %}}{answer}{{% endif %}}'
        "{% endfor %}"
    )


def _text(text: str) -> str:
    """Return `text` as an expression; empty if there is none."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""
