"""Write a built-in prompt template in the languages of other programs: Jinja, and Ollama's Go."""

from __future__ import annotations

import json

from vila_deploy.processing.chat_template import IMAGE_MARKER, PromptTemplate

VIDEO_MARKER = "<vila/video>"
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


# Images before or behind all text come first, others stay where they are, as prompt.py has it.
_PARTS = (
    "{%- macro marker(part) -%}"
    "{%- if 'image' in part['type'] -%}@image{%- elif 'video' in part['type'] -%}@video"
    "{%- endif -%}{%- endmacro -%}"
    "{%- macro written(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- set texts = content | selectattr('type', 'equalto', 'text') | list -%}"
    "{%- set at = namespace(first=-1, last=-1, after_text=false) -%}"
    "{%- for part in content -%}{%- if part['type'] == 'text' -%}"
    "{%- if at.first < 0 -%}{%- set at.first = loop.index0 -%}{%- endif -%}"
    "{%- set at.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- if at.last - at.first + 1 == texts | length or not texts -%}"
    "{%- for part in content -%}{{- marker(part) -}}{%- endfor -%}"
    "{{- texts | map(attribute='text') | join('\\n') -}}"
    "{%- else -%}{%- for part in content -%}{%- if part['type'] == 'text' -%}"
    "{{- ('\\n' if at.after_text else '') + part['text'] -}}{%- set at.after_text = true -%}"
    "{%- else -%}{{- marker(part) -}}{%- set at.after_text = false -%}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}{%- endif -%}{%- endmacro -%}"
)


def jinja_template_with_images(template: PromptTemplate) -> str:
    """Return `jinja_template` for messages whose content is text or OpenAI's list of parts.

    For models whose images are followed by `image_end`: no newline stands behind their markers.
    """
    parts = _PARTS.replace("@image", IMAGE_MARKER).replace("@video", VIDEO_MARKER)
    text = jinja_template(template).replace(
        "messages[0]['content']", "written(messages[0].content)"
    )
    return parts + text.replace("message['content']", "written(message.content)")


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
        f"{_ollama_answer(template.before_answer)}{template.end_of_answer}"
    )


def _ollama_answer(before: str) -> str:
    """Return what writes an answer; Ollama ends a prompt where the answer is first mentioned."""
    if not before:
        return "{{ .Response }}"
    assert len(before) == 1, "the template compares one letter"
    # Ollama returns a first answer with the space that its first token has, other clients trim it.
    missing = f'{{{{ if ne (slice .Response 0 1) "{before}" }}}}{before}{{{{ end }}}}'
    return f"{{{{ if .Response }}}}{missing}{{{{ .Response }}}}{{{{ end }}}}"
