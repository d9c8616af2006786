"""Write a built-in prompt template in the languages of other programs: Jinja, and Ollama's Go."""

from __future__ import annotations

import json

from vila_deploy.processing.chat_template import PromptTemplate

_JINJA = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = @message -%}{%- set turns = messages -%}{%- endif -%}"
    "{{- @before_system + system + @after_system -}}"
    "{%- for message in turns -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- @user + message['content'] + @assistant -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- @before_answer + message['content'] + @end_of_answer -}}"
    "{%- endif -%}{%- endfor -%}"
)


def jinja_template(template: PromptTemplate) -> str:
    """Return the Jinja template that writes what `chat_template.render` writes.

    Behind a question the answer begins, whether a prompt for generation was asked for or not.
    """
    before, after = template.system.split(template.system_message)
    parts = {
        "message": template.system_message,
        "before_system": before,
        "after_system": after,
        "user": template.user,
        "assistant": template.assistant,
        "before_answer": template.before_answer,
        "end_of_answer": template.end_of_answer,
    }
    text = _JINJA
    for name, value in parts.items():
        text = text.replace(f"@{name}", json.dumps(value))
    return text


def ollama_template(template: PromptTemplate, bos: str = "") -> str:
    """Return the template of an Ollama Modelfile; Ollama renders it turn by turn.

    Args:
        bos: text that is left out, since Ollama puts that token in front itself.
    """
    before, after = template.system.split(template.system_message)
    if bos:
        before = before.removeprefix(bos)
    return (
        f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ end }}}}"
        f"{template.user}{{{{ .Prompt }}}}{template.assistant}"
        f"{{{{ .Response }}}}{template.end_of_answer}"
    )
