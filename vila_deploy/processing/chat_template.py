"""Render conversations: one row a template, and the template that a model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.variants import PROMPT_CHOICES
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.utils.errors import VilaDeployError

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class PromptTemplate:
    """The fixed strings of a conversation: `system`, then `user` and `assistant` of each turn.

    Args:
        system_message: the part of `system` that another system message replaces.
        end_of_answer: follows each answer.
        stops: tokens that end an answer.
        before_answer: stands between `assistant` and an answer that is known already.
        end_of_conversation: replaces `end_of_answer` after the last turn; empty: no difference.
    """

    system: str
    user: str
    assistant: str
    end_of_answer: str
    stops: tuple[str, ...]
    system_message: str
    before_answer: str = ""
    end_of_conversation: str = ""


_VICUNA_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_3_MESSAGE = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_LLAMA_3_SYSTEM = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_LLAMA_3_MESSAGE}"
)
_LLAMA_3_STOPS = ("<|eot_id|>", "<|end_of_text|>")

# Keyed by PROMPT_NAMES.
PROMPT_TEMPLATES = {
    "vicuna_v1": PromptTemplate(
        system=f"{_VICUNA_MESSAGE} ",
        system_message=_VICUNA_MESSAGE,
        user="USER: ",
        assistant=" ASSISTANT:",
        before_answer=" ",
        end_of_answer="</s>",
        stops=("</s>",),
    ),
    # Since August 2024, so most likely of Llama-3-VILA1.5-8B-Fix.
    "llama_3": PromptTemplate(
        system=f"{_LLAMA_3_SYSTEM}<|eot_id|>",
        system_message=_LLAMA_3_MESSAGE,
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end_of_answer="<|eot_id|>",
        end_of_conversation="<|end_of_text|>",
        stops=_LLAMA_3_STOPS,
    ),
    # As VILA1.5 was released: every block ends the text, and answers stand under "system" too.
    "llama_3_original": PromptTemplate(
        system=f"{_LLAMA_3_SYSTEM}<|end_of_text|>",
        system_message=_LLAMA_3_MESSAGE,
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|end_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
        end_of_answer="<|end_of_text|>",
        stops=_LLAMA_3_STOPS,
    ),
    # ChatML, but with no newline after <|im_end|>.
    "hermes-2": PromptTemplate(
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        system_message="Answer the questions.",
        user="<|im_start|>user\n",
        assistant="<|im_end|><|im_start|>assistant\n",
        end_of_answer="<|im_end|>",
        stops=("<|im_end|>",),
    ),
    "qwen2": PromptTemplate(
        system="<|im_start|>system\nYou are a helpful assistant<|im_end|>\n",
        system_message="You are a helpful assistant",
        user="<|im_start|>user\n",
        assistant="<|im_end|>\n<|im_start|>assistant\n",
        end_of_answer="<|im_end|>\n",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
}


def choose_template(config: VilaConfig, tokenizer: Tokenizer | None) -> str:
    """Return the name of the model's template: from its root config, or the first that fits.

    Args:
        tokenizer: None for a model without one, which gets its family's most general template.
    """
    if config.prompt_template is not None:
        return config.prompt_template
    return next(
        choice.template
        for choice in PROMPT_CHOICES
        if choice.family == config.llm.family.name
        and (
            choice.token is None
            or (tokenizer is not None and tokenizer.token_id(choice.token) is not None)
        )
    )


def stop_token_ids(template: PromptTemplate, tokenizer: Tokenizer) -> set[int]:
    """Return the ids of the template's stop tokens that this tokenizer has."""
    ids = (tokenizer.token_id(token) for token in template.stops)
    return {token for token in ids if token is not None}


def with_markers(question: str, num_images: int, image_end: str = "") -> str:
    """Return `question` with one marker for each image: in front, unless it has markers itself.

    Args:
        image_end: see ModelInfo; with one, no newline is needed after the markers.

    Raises:
        VilaDeployError: the question has markers, but not as many as there are images.
    """
    markers = question.count(IMAGE_MARKER)
    if markers == num_images:
        return question
    if markers:
        raise VilaDeployError(
            f"the prompt has {markers} {IMAGE_MARKER} markers for {num_images} images",
            fix="give one --image for each marker, or no marker at all",
        )
    return (IMAGE_MARKER if image_end else f"{IMAGE_MARKER}\n") * num_images + question


def with_tile_markers(question: str, tiles: int) -> str:
    """Return `question`, about one image, with a marker and a newline for each of its tiles."""
    return question.replace(IMAGE_MARKER, f"{IMAGE_MARKER}\n" * tiles)


def render(
    template: PromptTemplate,
    turns: Sequence[tuple[str, str]],
    question: str,
    system: str | None = None,
) -> str:
    """Return the text up to the point where the assistant's next answer begins.

    Args:
        turns: earlier (question, answer) pairs of this conversation.
        system: replaces the template's own system message.
    """
    text = template.system
    if system is not None:
        text = text.replace(template.system_message, system)
    for earlier, answer in turns:
        text += f"{template.user}{earlier}{template.assistant}{template.before_answer}{answer}"
        text += template.end_of_answer
    return f"{text}{template.user}{question}{template.assistant}"


def render_answered(
    template: PromptTemplate, question: str, answer: str, turns: Sequence[tuple[str, str]] = ()
) -> str:
    """Return a complete conversation, as in training; `turns` come before the question."""
    end = template.end_of_conversation or template.end_of_answer
    return f"{render(template, turns, question)}{template.before_answer}{answer}{end}"
