"""Tell the generation of VILA's code and the prompt template that a root config stands for."""

from __future__ import annotations

from vila_deploy.checkpoint.variants import (
    CONVERSATION_NAMES,
    NVILA_KEYS,
    PROMPT_NAMES,
    TRAINED_FROM,
    LlmFamily,
)
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields


def generation_of(root: Fields, family: LlmFamily) -> str:
    """Return the key of GENERATIONS by which images enter the prompts of a checkpoint.

    Args:
        root: the root config.json.
        family: of the LLM, which decides where the root config has no key of NVILA's code.
    """
    return "nvila" if any(key in root for key in NVILA_KEYS) else family.generation


def prompt_template(
    root: Fields, llm: Fields, family: LlmFamily, asked: str | None = None
) -> str | None:
    """Return the prompt template that is asked for, or that the configs name; None for neither.

    Args:
        root: the root config.json.
        llm: llm/config.json.
        family: of the LLM.
        asked: by the user, who overrides the configs.

    Raises:
        VilaDeployError: unknown, or a model of which nothing tells the template.
    """
    if asked is not None:
        return _known(asked)
    if "prompt_template" in root:
        return root.choice("prompt_template", PROMPT_NAMES, what="prompt template")
    named = _conversation(root)
    trained_from = TRAINED_FROM.get(str(llm.values.get("_name_or_path")), {})
    template = trained_from.get(named or "llama_3", named)
    generation = generation_of(root, family)
    if template is None and generation != family.generation:
        # There the tokenizer's own chat template counts, which only Qwen2 has known to be ours.
        raise VilaDeployError(
            f"nothing tells the prompt template of a {family.name} LLM in {generation}'s layout",
            where=root.source,
            fix=f"name the one that it was trained with: {_HOW_TO_NAME}",
        )
    return template


def _known(name: str) -> str:
    if name not in PROMPT_NAMES:
        raise VilaDeployError(
            f"unknown prompt template {short(name)}", fix=f"choose from {', '.join(PROMPT_NAMES)}"
        )
    return name


def _conversation(root: Fields) -> str | None:
    """Return the template that `chat_template` of the root config names."""
    if "chat_template" not in root:
        return None
    name = root.text("chat_template")
    if name not in CONVERSATION_NAMES:
        raise root.error(
            "chat_template",
            f"unknown conversation {short(name)}",
            f"name the template that the model was trained with: {_HOW_TO_NAME}",
        )
    return CONVERSATION_NAMES[name]


_HOW_TO_NAME = (
    '--prompt-template, or the key "prompt_template" in this file, with '
    f"{', '.join(PROMPT_NAMES[:-1])} or {PROMPT_NAMES[-1]}"
)
