"""Small made-up copies of benchmarks, in the forms of their published files."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def write_image(path: Path, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (size, 9, 30)).save(path)
    return path


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def make_own(folder: Path) -> Path:
    """Make questions of every kind about two images."""
    for name in ("a.png", "below/b.png"):
        write_image(folder / name)
    rows = [
        {"image": "a.png", "question": "What colour?", "answer": "red", "category": "colour"},
        {"image": ["a.png", "below/b.png"], "question": "<image> <image> How many?", "answer": 2},
        {"question": "Which?", "choices": ["yes", "no"], "answer": "no"},
        {"question": "Which?", "choices": ["yes", "no"], "answer": "A", "id": "x"},
        {"question": "What does it say?", "answer": ["yes", "no"], "metric": "anls"},
        {"question": "Who?", "answer": ["a man"] * 10, "metric": "vqa", "category": "people"},
    ]
    write_lines(folder / "questions.jsonl", rows)
    return folder


def make_textvqa(folder: Path) -> Path:
    data = [
        {"image_id": "i1", "question_id": 34602, "question": "what Brand is it?",
         "answers": ["nokia"] * 10},
        {"image_id": "i2", "question_id": 34603, "question": "Who says so?",
         "answers": ["bob"] * 7 + ["rob"] * 3},
    ]  # fmt: skip
    for row in data:
        write_image(folder / "train_images" / f"{row['image_id']}.jpg")
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}), "utf-8")
    return folder


def add_ocr_prompts(folder: Path) -> Path:
    rows = [
        {"question_id": "i1", "image": "i1.jpg", "text": "what Brand is it?\nReference OCR token: "
         "NOKIA\nAnswer the question using a single word or phrase.", "category": "default"},
    ]  # fmt: skip
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    return folder


def make_pope(folder: Path) -> Path:
    write_image(folder / "val2014" / "COCO_1.jpg")
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": "COCO_1.jpg", "text": f"Is there a {n} in the image?",
             "label": ("yes", "no")[n % 2]}
            for n in range(4)
        ]  # fmt: skip
        write_lines(folder / "coco" / f"coco_pope_{category}.json", rows)
    return folder


def make_scienceqa(folder: Path) -> Path:
    write_image(folder / "images/test/5/image.png")
    problems = {
        "5": {"choices": ["north", "south"], "answer": 1},
        "6": {"choices": ["a", "b", "c"], "answer": 0},
    }
    prompts = [
        {"id": "5", "image": "5/image.png", "conversations": [
            {"from": "human", "value": "<image>\nWhich way?\nA. north\nB. south"},
            {"from": "gpt", "value": "The answer is B."}]},
        {"id": "6", "conversations": [{"from": "human", "value": "Which?"}]},
    ]  # fmt: skip
    (folder / "problems.json").write_text(json.dumps(problems), "utf-8")
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(prompts), "utf-8")
    return folder


def make_gqa(folder: Path) -> Path:
    write_image(folder / "images" / "n1.jpg")
    questions = {
        "201": {"imageId": "n1", "question": "Is it red?", "answer": "yes", "isBalanced": True},
        "202": {"imageId": "n1", "question": "What is it?", "answer": "car"},
    }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions), "utf-8")
    return folder


def make_mmbench(folder: Path) -> Path:
    """Make two questions, the first in two orders, whose second image is a reference."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(stream, "PNG")
    image = base64.b64encode(stream.getvalue()).decode()
    header = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
    rows = [
        ("3", "Which?", "Look.", "yes", "no", "", "", "A", "logic", image),
        ("1000003", "Which?", "Look.", "no", "yes", "", "", "B", "logic", "3"),
        ("4", "How?", "", "well", "badly", "not", "nan", "C", "style", image),
    ]
    lines = ["\t".join(row) for row in (header, *rows)]
    (folder / "mmbench_dev_20230712.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "own": make_own,
    "textvqa": make_textvqa,
    "pope": make_pope,
    "scienceqa-img": make_scienceqa,
    "gqa": make_gqa,
    "mmbench": make_mmbench,
}
