"""The model `vila_deploy` of lmms-eval: --model vila_deploy --model_args pretrained=DIR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.harness.asking import Inquiry, ask
from vila_deploy.harness.subject import open_subject
from vila_deploy.processing.images import read_image
from vila_deploy.processing.placeholders import Media
from vila_deploy.processing.video import sample_video
from vila_deploy.utils.errors import VilaDeployError, short

DEFAULT_NEW_TOKENS = 128
# What tasks ask of generation; other keys would change answers without our knowing how.
KNOWN_KEYS = (
    "max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until",
    "image_aspect_ratio",
)  # fmt: skip


class VilaDeploy(lmms):
    """An engine or a checkpoint, asked as VILA's own plugin asks: media first, then the text.

    Args:
        pretrained: engine folder, checkpoint folder, or OWNER/NAME on the hub.
        slots: questions that an engine answers at once; None: as many as memory holds.
        prompt_template: of a checkpoint whose configs name none.
        video_frames: images from each video; None: the model's own number.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        slots: int | None = None,
        prompt_template: str | None = None,
        video_frames: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self._subject = open_subject(Path(pretrained), slots, prompt_template)
        self._video_frames = video_frames

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answers in the order of `requests`.

        Raises:
            VilaDeployError: an image can't be read, a prompt is too long, or a task wants what is
                not supported, such as beams.
        """
        inquiries = ((place, self._inquiry(request)) for place, request in enumerate(requests))
        answers: dict[int, str] = {}
        for place, reply in ask(inquiries, self._subject):
            if isinstance(reply, VilaDeployError):
                raise reply
            answers[place] = reply.strip()
        return [answers[place] for place in range(len(requests))]

    def _inquiry(self, request: Instance) -> Inquiry:
        text, settings, doc_to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        return Inquiry(text, partial(self._media, doc_to_visual, doc), sampling(settings), stop)

    def _media(self, doc_to_visual: Any, doc: Any) -> Sequence[Media]:
        return [self._medium(visual) for visual in doc_to_visual(doc) or ()]

    def _medium(self, visual: Any) -> Media:
        """Return an image, or the frames of a video, which tasks give by its path."""
        if not isinstance(visual, str):
            return read_image(visual)
        model = self._subject.model
        return sample_video(
            Path(visual),
            video=model.video,
            image=model.image,
            tiling=model.tiling,
            count=self._video_frames,
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise VilaDeployError(
            "tasks of several rounds are not supported", fix="choose tasks of one question each"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise VilaDeployError(
            "tasks by log-likelihood are not supported", fix="choose tasks that generate answers"
        )


def sampling(settings: dict[str, Any]) -> SamplingParams:
    """Return the settings that a task gives for generation.

    Raises:
        VilaDeployError: a key or value that is not supported.
    """
    for key in settings:
        if key not in KNOWN_KEYS:
            raise VilaDeployError(
                f"generation_kwargs has {short(key)}", fix=f"use {', '.join(KNOWN_KEYS)}"
            )
    if settings.get("num_beams") not in (None, 1):
        raise VilaDeployError("beams are not supported", fix="set num_beams to 1")
    temperature = settings.get("temperature") or 0.0
    if settings.get("do_sample") is False:
        temperature = 0.0
    top_p = settings.get("top_p")
    return SamplingParams(
        max_new_tokens=settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS,
        temperature=float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        seed=0,
    )


def manifest() -> ModelManifest:
    """Return what lmms-eval registers; the entry point."""
    name = f"{VilaDeploy.__module__}.{VilaDeploy.__name__}"
    return ModelManifest(model_id="vila_deploy", simple_class_path=name)
