"""Conversation templates, one row each, and the stop strings that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vila_deploy.errors import VilaDeployError

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class PromptTemplate:
    """`system`, then for each turn `user` + question + `assistant` + answer + `end_of_answer`."""

    system: str
    user: str
    assistant: str
    end_of_answer: str


PROMPT_TEMPLATES = {
    "vicuna_v1": PromptTemplate(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        ),
        user="USER: ",
        assistant=" ASSISTANT:",
        end_of_answer="</s>",
    ),
}


def with_markers(question: str, num_images: int) -> str:
    """`question` with one image marker for each picture: in front, unless it places them itself.

    Raises:
        VilaDeployError: the question has markers, but not as many as there are pictures.
    """
    markers = question.count(IMAGE_MARKER)
    if markers == num_images:
        return question
    if markers:
        raise VilaDeployError(
            f"the prompt has {markers} {IMAGE_MARKER} markers for {num_images} images",
            fix="give one --image for each marker, or no marker at all",
        )
    return f"{IMAGE_MARKER}\n" * num_images + question


def render(template: PromptTemplate, turns: Sequence[tuple[str, str]], question: str) -> str:
    """The text up to where the assistant's next answer begins.

    Args:
        turns: earlier (question, answer) pairs of this conversation.
    """
    text = template.system
    for asked, answered in turns:
        text += f"{template.user}{asked}{template.assistant} {answered}{template.end_of_answer}"
    return f"{text}{template.user}{question}{template.assistant}"
