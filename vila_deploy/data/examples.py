"""Examples to calibrate or evaluate with: shipped ones, or the user's own texts and pictures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from vila_deploy.data import drawn_scenes_eval
from vila_deploy.data.drawn_scenes import SCENES, Scene
from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.images import open_image
from vila_deploy.quantize.options import Options
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.writers.registry import FORMATS

MAX_FILE_BYTES = 64 << 20
PICTURE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
EMPTY_LINES = re.compile(r"\r?\n[^\S\n]*\n")
TEXT_SUFFIXES = (".txt", ".jsonl")
PICTURE_QUESTIONS = (
    "Describe this image.",
    "What is in the picture?",
    "Describe the image in detail, from left to right.",
    "What is happening here?",
)


@dataclass(frozen=True)
class Picture:
    """A picture that is opened when it is needed; `name` tells it from the others."""

    name: str
    load: Callable[[], Image.Image]

    @classmethod
    def of_file(cls, path: Path) -> Picture:
        return cls(str(path), lambda: open_image(path))


@dataclass(frozen=True)
class Example:
    """A plain text, or a question with pictures, an answer, or both."""

    text: str
    answer: str | None = None
    pictures: tuple[Picture, ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.answer is None and not self.pictures


def load_examples(
    texts: Path | None, pictures: Path | None, *, text_only: bool = False
) -> list[Example]:
    """The examples to calibrate with; what the user gives replaces the shipped ones of its kind.

    Args:
        texts: a .txt file (paragraphs), a .jsonl file (objects with `text` and, if wanted, `answer`
            and `image`), or a folder of such files.
        pictures: a folder of pictures.
        text_only: leave out every example with pictures.

    Raises:
        VilaDeployError: a file that is no such thing, is too large, or holds nothing.
    """
    own = _own_texts(texts) if texts else []
    if pictures:
        own += _own_pictures(pictures)
    examples = list(own)
    if not any(not example.pictures for example in own):
        examples += shipped_texts()
    if not any(example.pictures for example in own):
        examples += shipped_pictures()
    return [e for e in examples if not (text_only and e.pictures)]


def load_held_out(path: Path | None) -> list[Example]:
    """The examples to evaluate with: the user's own, or the shipped ones.

    Args:
        path: what `load_examples` takes as `texts`, or a folder of nothing but pictures.

    Raises:
        VilaDeployError: as `load_examples`.
    """
    if path is None:
        return _shipped_texts("evaluation") + _of_scenes(drawn_scenes_eval.SCENES)
    if path.is_dir() and not _files(path, TEXT_SUFFIXES) and _files(path, PICTURE_SUFFIXES):
        return _own_pictures(path)
    return _own_texts(path)


def data_warnings(
    options: Options, calibration: Sequence[Example], held_out: Sequence[Example]
) -> list[str]:
    """What the user should know of data and formats; printed on stderr too, a line each."""
    warnings = list[str]()
    own_pictures = {p.name for e in calibration for p in e.pictures} - {s.name for s in SCENES}
    if options.text_only and calibration:
        warnings.append(
            "calibrated without pictures (--text-only): answers about pictures may suffer most"
        )
    elif options.calib and not own_pictures:
        warnings.append(
            "no picture among the calibration data: the shipped drawings stand in; "
            "give your own with --calib-images"
        )
    seen = {(e.text, e.answer) for e in calibration}
    again = sum((e.text, e.answer) in seen for e in held_out if not e.pictures or e.answer)
    if again:
        warnings.append(
            f"{again} of {len(held_out)} evaluation examples were calibrated on: the figures are "
            "better than on new data"
        )
    warnings += filter(None, (FORMATS[name].warning(options.scheme) for name in options.formats))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return warnings


def shipped_texts() -> list[Example]:
    """The texts and conversations in calibration/, written for this project."""
    return _shipped_texts("calibration")


def shipped_pictures() -> list[Example]:
    """Conversations about the drawn scenes."""
    return _of_scenes(SCENES)


def _shipped_texts(name: str) -> list[Example]:
    folder = resources.files("vila_deploy.data") / name
    passages = (folder / "passages.txt").read_text("utf-8")
    conversations = (folder / "conversations.jsonl").read_text("utf-8")
    return [
        *_paragraphs(passages),
        *_from_lines(conversations, Path("conversations.jsonl")),
    ]


def _of_scenes(scenes: Sequence[Scene]) -> list[Example]:
    return [
        Example(question, answer, (Picture(scene.name, scene.picture),))
        for scene in scenes
        for question, answer in scene.conversations
    ]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """But those that other systems hide: macOS leaves ._photo.jpg beside photo.jpg."""
    found = (file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    return sorted(file for file in found if not file.name.startswith("."))


def _own_texts(path: Path) -> list[Example]:
    if path.is_dir():
        files = _files(path, TEXT_SUFFIXES)
        if not files:
            raise VilaDeployError(
                "holds no .txt or .jsonl file", where=path, fix="give a folder of texts"
            )
    else:
        files = [path]
    examples = [example for file in files for example in _read_file(file)]
    if not examples:
        raise VilaDeployError("holds no text", where=path, fix="give a file with some paragraphs")
    return examples


def _read_file(path: Path) -> list[Example]:
    fix = "give a UTF-8 text file or a .jsonl file"
    try:
        if not path.is_file():
            what = "is no regular file" if path.exists() else "no such file"
            raise VilaDeployError(what, where=path, fix=fix)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise VilaDeployError(
                f"is larger than {MAX_FILE_BYTES >> 20} MiB", where=path, fix="give a part of it"
            )
        # Windows' programs put a mark before the text.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise VilaDeployError(f"cannot be read: {error.strerror}", where=path, fix=fix) from error
    except UnicodeDecodeError as error:
        raise VilaDeployError(f"is not UTF-8 (byte {error.start})", where=path, fix=fix) from error
    if path.suffix.lower() == ".jsonl":
        return list(_from_lines(text, path))
    return list(_paragraphs(text))


def _paragraphs(text: str) -> Iterator[Example]:
    for paragraph in EMPTY_LINES.split(text):
        if paragraph.strip():
            yield Example(" ".join(paragraph.split()))


def _from_lines(text: str, path: Path) -> Iterator[Example]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _from_line(line, path, number)


def _from_line(line: str, path: Path, number: int) -> Example:
    def error(what: str) -> VilaDeployError:
        return VilaDeployError(
            what,
            where=f"{path}: line {number}",
            fix='write {"text": …} with "answer" and "image" if wanted',
        )

    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise error("is not valid JSON") from problem
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise error(f"must be an object with a string `text`, found {short(value)}")
    unknown = sorted(set(value) - {"text", "answer", "image"})
    if unknown:
        raise error(f"unknown key {short(unknown[0])}")
    answer, image = value.get("answer"), value.get("image")
    if not (answer is None or isinstance(answer, str)):
        raise error(f"answer must be a string, found {short(answer)}")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name and "\0" not in name for name in names):
        raise error(f"image must be a path or a list of paths, found {short(image)}")
    markers = value["text"].count(IMAGE_MARKER)
    if markers not in (0, len(names)) or IMAGE_MARKER in (answer or ""):
        raise error(f"has {markers} {IMAGE_MARKER} markers for {len(names)} images")
    pictures = tuple(Picture.of_file(path.parent / name) for name in names)
    return Example(_unicode(value["text"]), None if answer is None else _unicode(answer), pictures)


def _unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _own_pictures(folder: Path) -> list[Example]:
    if not folder.is_dir():
        raise VilaDeployError("no such folder", where=folder, fix="give a folder of pictures")
    files = _files(folder, PICTURE_SUFFIXES)
    if not files:
        raise VilaDeployError(
            f"holds no picture ({', '.join(PICTURE_SUFFIXES)})", where=folder, fix="add some"
        )
    return [
        Example(PICTURE_QUESTIONS[i % len(PICTURE_QUESTIONS)], None, (Picture.of_file(file),))
        for i, file in enumerate(files)
    ]
