"""Compare a model's next-token distributions with a reference's, on right answers and on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from vila_deploy.eval.metrics import Quality, TokenMetrics, compare_logits
from vila_deploy.harness.figures import bootstrap
from vila_deploy.harness.question import Question
from vila_deploy.harness.subject import Subject
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render, render_answered
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.processing.vocabulary import check_ids
from vila_deploy.runtime.conversation import encode_images
from vila_deploy.runtime.prompt import PromptImage, check_prompt_length, prepare_question
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import LOGIT_ROWS, MAX_TOKENS

TEXT, IMAGE = "text", "image"
# Of TokenMetrics.
COLUMNS = ("kl", "expected_loss", "loss", "same_top1")


@dataclass(frozen=True)
class TokenSample:
    """Token ids around the places of images.

    Args:
        predicted: so many tokens at the end are compared.
    """

    chunks: list[list[int]]
    images: tuple[PromptImage, ...]
    predicted: int

    @property
    def kind(self) -> str:
        return IMAGE if self.images else TEXT


def answered_sample(question: Question, subject: Subject) -> TokenSample:
    """Return a question with its first right answer, whose tokens are predicted.

    Raises:
        VilaDeployError: an image can't be read, or it is too long.
    """
    asked = prepare_question((*question.read_images(), question.text), subject.model)
    template = PROMPT_TEMPLATES[subject.model.prompt]
    whole = render_answered(template, asked.text, question.answers[0], [])
    prompt = render(template, [], asked.text)
    chunks, before = (
        text_chunks(subject.tokenizer, text, subject.model.recipe) for text in (whole, prompt)
    )
    # The last token of the prompt and the first of the answer may have become one.
    pairs = zip(chunks[-1], before[-1], strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if len(chunks[-1]) == common:
        raise VilaDeployError(f"question {question.id}: its answer has no tokens", fix="give one")
    return _checked(TokenSample(chunks, asked.images, len(chunks[-1]) - common), subject)


def text_samples(texts: Sequence[str], subject: Subject) -> list[TokenSample]:
    """Return plain texts, joined and cut into samples of at most 512 tokens; all but BOS count."""
    tokenizer = subject.tokenizer
    begin, ids = list(tokenizer.bos_ids), list[int]()
    for text in texts:
        ids += tokenizer.encode(f"{text}\n\n")
    room = min(MAX_TOKENS, subject.max_input_len) - len(begin)
    cut = [ids[start : start + room] for start in range(0, len(ids), max(room, 1))]
    return [
        _checked(TokenSample([begin + part], (), len(part) - (not begin)), subject)
        for part in cut
        if len(part) > 1
    ]


def _checked(sample: TokenSample, subject: Subject) -> TokenSample:
    check_ids(subject.tokenizer, sample.chunks, subject.model.vocab_size)
    images = sum(sum(image.token_counts) for image in sample.images)
    check_prompt_length(sum(map(len, sample.chunks)) + images, subject.max_input_len)
    return sample


def check_comparable(subject: Subject, reference: Subject, text: str) -> None:
    """Raise VilaDeployError unless both models speak the same tokens."""
    sizes = [opened.model.vocab_size for opened in (subject, reference)]
    ids = [opened.tokenizer.encode(text) for opened in (subject, reference)]
    if sizes[0] != sizes[1] or ids[0] != ids[1]:
        raise VilaDeployError(
            f"has other tokens than {reference.name}",
            where=subject.name,
            fix="give the checkpoint that it was made from as --reference",
        )


@torch.inference_mode()
def compare(sample: TokenSample, subject: Subject, reference: Subject) -> dict[str, Any]:
    """Return the figures of a sample's predicted tokens as JSON lists, and its `kind`.

    Raises:
        VilaDeployError: the models take images in other ways.
    """
    expected, actual = (_logits(sample, opened) for opened in (reference, subject))
    following = [token for chunk in sample.chunks for token in chunk][-sample.predicted :]
    targets, metrics = torch.tensor(following), TokenMetrics.zeros(len(following))
    for begin in range(0, len(following), LOGIT_ROWS):
        rows = slice(begin, begin + LOGIT_ROWS)
        # Copies, since they are overwritten.
        first, second = (torch.from_numpy(np.array(part[rows])) for part in (expected, actual))
        compare_logits(first, second, targets[rows], metrics[rows])
    values = {name: getattr(metrics, name).tolist() for name in COLUMNS}
    return {"kind": sample.kind, **values}


def _logits(sample: TokenSample, subject: Subject) -> Floats:
    """Return the logits [predicted, vocab] that predict the last tokens of a sample."""
    session = subject.session
    features = encode_images(session, [image.pixels for image in sample.images])
    embeds = merge_embeddings(sample.chunks, features, session.embed_tokens)
    session.keep(0, 0)
    begin = len(embeds) - sample.predicted - 1
    if begin:
        session.prefill(0, embeds[:begin], more=True)
    logits = session.prefill(0, embeds[begin:-1], all_logits=True)
    session.keep(0, 0)
    return logits


def summarize(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return Quality of each kind, and the interval of mean KL; samples are what is resampled."""
    report: dict[str, Any] = {}
    for kind in (TEXT, IMAGE, "all"):
        chosen = [sample for sample in samples if kind in ("all", sample["kind"])]
        quality = Quality.of(_joined(chosen)) if chosen else None
        report[kind] = quality and {**asdict(quality), "kl_interval": _kl_interval(chosen)}
    return report


def _kl_interval(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = np.array([sum(sample["kl"]) for sample in samples])
    tokens = np.array([len(sample["kl"]) for sample in samples])
    figure = bootstrap(len(sums), lambda places: float(sums[places].sum() / tokens[places].sum()))
    return figure.to_json()


def _joined(samples: Sequence[dict[str, Any]]) -> TokenMetrics:
    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([value for s in samples for value in s[name]], dtype=dtype)

    kl, expected_loss, loss = (column(name, torch.float64) for name in COLUMNS[:3])
    return TokenMetrics(kl, expected_loss, loss, column("same_top1", torch.bool))


def is_measured(result: object) -> bool:
    """Return whether `result`, out of a file that users may edit, is what `compare` returned."""
    if not isinstance(result, dict) or result.get("kind") not in (TEXT, IMAGE):
        return False
    columns = [result.get(name) for name in COLUMNS]
    lists = [c for c in columns if isinstance(c, list) and c and all(map(_is_number, c))]
    return len(lists) == len(COLUMNS) and len(set(map(len, lists))) == 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def worst_kl(report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the kinds that were measured with their mean KL, the greatest first."""
    measured = [(kind, report[kind]["kl_mean"]) for kind in (TEXT, IMAGE) if report[kind]]
    yield from sorted(measured, key=lambda pair: -pair[1])
