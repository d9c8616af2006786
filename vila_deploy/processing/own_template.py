"""Recognise the chat template that comes with a tokenizer as a built-in one, and follow it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.processing.added_tokens import read_settings
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, choose_template, render
from vila_deploy.processing.template_worker import render_within_limits
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

MAX_TEMPLATE_CHARACTERS = 1 << 17
TURN, QUESTION = ("the first question", "its answer"), "the last question"


def follow_tokenizer(config: VilaConfig, folder: Path) -> VilaConfig:
    """Return `config` with the tokenizer's own template, where VILA's code uses that one too.

    VILA's code since NVILA does, unless a conversation is named; that of VILA1.5 never does.

    Args:
        folder: of the tokenizer.

    Returns:
        `config` itself where its own rule decides, or where no built-in template is recognised.
    """
    if config.prompt_template is not None or config.generation != "nvila":
        return config
    source = own_template(folder)
    recognized = recognize(source, folder) if source is not None else ()
    if not recognized or choose_template(config, None) in recognized:
        return config
    return replace(config, prompt_template=recognized[0])


def template_note(folder: Path, config: VilaConfig) -> str | None:
    """Return a line where the tokenizer's own chat template differs from the one that is used.

    Args:
        folder: of the tokenizer.

    Returns:
        None if there is none, if both write the same text, or if a template is named.
    """
    source = own_template(folder)
    if source is None or config.prompt_template is not None:
        return None
    try:
        used = choose_template(config, load_tokenizer(folder))
    except VilaDeployError:
        # A plan needs no tokenizer; what does need one says what is wrong with it.
        return None
    recognized = recognize(source, folder)
    if used in recognized:
        return None
    followed = follow_tokenizer(config, folder).prompt_template
    if followed is not None:
        return (
            f"note: the tokenizer's chat template is {followed}, which is used instead of {used}; "
            f"--prompt-template {used} overrides it"
        )
    if recognized:
        return (
            f"note: the tokenizer's chat template is {recognized[0]}, but {used} is used; "
            f"--prompt-template {recognized[0]} follows the tokenizer"
        )
    return (
        f"note: the tokenizer's own chat template is not used, {used} is; "
        "it writes other text than every built-in one (--prompt-template)"
    )


def own_template(folder: Path) -> str | None:
    """Return the text of chat_template.jinja, else of tokenizer_config.json's chat_template."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > MAX_TEMPLATE_CHARACTERS:
            raise VilaDeployError(f"larger than {MAX_TEMPLATE_CHARACTERS} bytes", where=file)
        return file.read_text("utf-8", "replace")
    value = read_settings(folder / "tokenizer.json").values.get("chat_template")
    if isinstance(value, list):
        # Several by name, of which conversations without tools take the default.
        named = [item for item in value if isinstance(item, dict)]
        value = next((v.get("template") for v in named if v.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def recognize(source: str, folder: Path) -> tuple[str, ...]:
    """Return the built-in templates that write the same conversation as `source` does."""
    return _recognize(source, tuple(_named_tokens(folder).items()))


@lru_cache(maxsize=8)
def _recognize(source: str, named: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Do what `recognize` does, once for a template: to render one takes a process."""
    tokens = dict(named)
    text = _rendered(source, tokens)
    if text is None:
        return ()
    # BOS is the tokenizer's business: a template may write it too.
    texts = {text, text.removeprefix(tokens.get("bos_token", ""))}
    rows = PROMPT_TEMPLATES.items()
    return tuple(name for name, row in rows if render(row, [TURN], QUESTION) in texts)


def _rendered(source: str, tokens: dict[str, str]) -> str | None:
    """Return what a template writes; None if it fails or is too large."""
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        return None
    roles = [("user", TURN[0]), ("assistant", TURN[1]), ("user", QUESTION)]
    messages = [{"role": role, "content": content} for role, content in roles]
    return render_within_limits(source, messages, tokens)


def _named_tokens(folder: Path) -> dict[str, str]:
    values: dict[str, Any] = read_settings(folder / "tokenizer.json").values
    tokens = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[key] = value
    return tokens
