"""Turn the messages of a chat request into the tokens and places that vLLM and SGLang take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vila_deploy.integrations.places import Place, with_places
from vila_deploy.integrations.served_model import ServedModel
from vila_deploy.runtime.prompt import prepare_text
from vila_deploy.server.openai_fields import RequestFields
from vila_deploy.server.openai_schema import parse_chat
from vila_deploy.server.options import RequestLimits
from vila_deploy.server.prompts import PromptMaker


class PromptInput:
    """Makes prompts exactly as vila-serve does: one code for templates, images and refusals.

    Args:
        max_tokens: of a prompt.
        max_images: images and frames of a request.
    """

    def __init__(self, model: ServedModel, max_tokens: int, max_images: int):
        self._model = model
        limits = RequestLimits(images=max_images)
        self._prompts = PromptMaker(model.info, model.tokenizer, limits, max_tokens)

    def chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[Place]]:
        """Return the tokens and places of a conversation.

        Args:
            messages: as JSON has them.

        Raises:
            VilaDeployError: messages or images that are refused; it names the field.
        """
        request = parse_chat(RequestFields({"messages": messages}))
        return with_places(self._prompts.render(request))

    def text(self, prompt: str) -> list[int]:
        """Return the tokens of bare text, without the model's template.

        Raises:
            VilaDeployError: it marks the place of an image, or is no UTF-8.
        """
        return list(prepare_text(prompt, self._model.tokenizer).token_ids)

    def close(self) -> None:
        """End the threads."""
        self._prompts.close()


def plain_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as JSON has them: pydantic hands out lists as iterators, to be read once."""
    return [_plain(message) for message in messages]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(message)
    content = values.get("content")
    if content is not None and not isinstance(content, str):
        values["content"] = [dict(part) for part in content]
    return values
