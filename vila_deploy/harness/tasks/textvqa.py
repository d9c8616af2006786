"""TextVQA: TextVQA_0.5.1_val.json, train_images/, and prompts with OCR tokens if they are there."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.harness.question import Question
from vila_deploy.harness.tasks.files import (
    as_row,
    file_image,
    find_file,
    identifier,
    parse_json,
    read_text,
    rows_of,
    texts,
)
from vila_deploy.harness.tasks.prompts import short_answer
from vila_deploy.harness.tasks.task import Task, mean_score
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

ANNOTATIONS, PROMPTS, IMAGES = (
    "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl", "train_images",
)  # fmt: skip
OCR = "Reference OCR token:"


def read_textvqa(folder: Path) -> Task:
    """Return the questions of the validation split.

    With PROMPTS, LLaVA's file which VILA1.5's script uses, OCR tokens stand in the questions; the
    published scores are of that kind. Without it the questions alone are asked, as NVILA's are.
    """
    path = find_file(folder, ANNOTATIONS)
    content = as_row(parse_json(read_text(path), path), path, "file")
    data = content.values.get("data")
    if not isinstance(data, list) or not data:
        raise content.error("data", "must be a list of questions")
    rows = [as_row(value, path, f"data[{number}]") for number, value in enumerate(data)]
    with_ocr = (folder / PROMPTS).is_file()
    questions = _prompted(folder, rows) if with_ocr else [_plain(folder, row) for row in rows]
    note = "" if with_ocr else f"without OCR tokens: the authors' scores need {PROMPTS}"
    return Task("textvqa", "VQA accuracy", tuple(questions), mean_score, ("VQA-T",), note)


def _plain(folder: Path, row: Fields) -> Question:
    image = identifier(row, "image_id")
    name = identifier(row, "question_id") if "question_id" in row else image
    text = short_answer(row.text("question").capitalize())
    images = (file_image(folder / IMAGES, f"{image}.jpg", row, "image_id"),)
    return Question(name, text, texts(row, "answers"), "vqa", images)


def _prompted(folder: Path, rows: list[Fields]) -> list[Question]:
    known = {(identifier(row, "image_id"), row.text("question").lower()): row for row in rows}
    questions = []
    for number, row in enumerate(rows_of(folder / PROMPTS)):
        text, image = row.text("text"), identifier(row, "question_id")
        annotation = known.get((image, _asked(text).lower()))
        if annotation is None:
            raise VilaDeployError(
                "asks what the annotations don't hold",
                where=f"{row.source}: {row.prefix}text",
                fix=f"use the files that belong to {ANNOTATIONS}",
            )
        images = (file_image(folder / IMAGES, row.text("image"), row),)
        answers = texts(annotation, "answers")
        questions.append(Question(f"{number} {image}", text, answers, "vqa", images))
    return questions


def _asked(text: str) -> str:
    """Return the question in a prompt: the line before that of OCR tokens or of instructions."""
    lines = text.split("\n")
    return lines[1] if text.startswith(OCR) and len(lines) > 1 else lines[0]
