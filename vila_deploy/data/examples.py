"""Read examples to calibrate or evaluate with: built-in ones, or the user's texts and images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from vila_deploy.data import drawn_scenes_eval
from vila_deploy.data.drawn_scenes import SCENES, Scene
from vila_deploy.processing.chat_template import IMAGE_MARKER
from vila_deploy.processing.images import read_image
from vila_deploy.utils.errors import VilaDeployError, short

MAX_FILE_BYTES = 64 << 20
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
EMPTY_LINES = re.compile(r"\r?\n[^\S\n]*\n")
TEXT_SUFFIXES = (".txt", ".jsonl")
IMAGE_QUESTIONS = (
    "Describe this image.",
    "What is in the picture?",
    "Describe the image in detail, from left to right.",
    "What is happening here?",
)


@dataclass(frozen=True)
class LazyImage:
    """An image that is opened when it is needed; `name` identifies it."""

    name: str
    load: Callable[[], Image.Image]

    @classmethod
    def from_file(cls, path: Path) -> LazyImage:
        return cls(str(path), lambda: read_image(path))


@dataclass(frozen=True)
class Example:
    """A plain text, or a question with images, an answer, or both."""

    text: str
    answer: str | None = None
    images: tuple[LazyImage, ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.answer is None and not self.images


def load_examples(
    texts: Path | None, images: Path | None, *, text_only: bool = False
) -> list[Example]:
    """Return the examples to calibrate with; the user's replace the built-in ones of their kind.

    Args:
        texts: a .txt file (paragraphs), a .jsonl file (objects with `text` and, if wanted, `answer`
            and `image`), or a folder of such files.
        images: a folder of images.
        text_only: leave out every example with images.

    Raises:
        VilaDeployError: a file is of another kind, too large, or empty.
    """
    own = _own_texts(texts) if texts else []
    if images:
        own += _own_images(images)
    examples = list(own)
    if not any(not example.images for example in own):
        examples += builtin_text_examples()
    if not any(example.images for example in own):
        examples += builtin_image_examples()
    return [e for e in examples if not (text_only and e.images)]


def load_held_out(path: Path | None) -> list[Example]:
    """Return the examples to evaluate with: the user's own, or the built-in ones.

    Args:
        path: as `texts` of `load_examples`, or a folder that holds images only.

    Raises:
        VilaDeployError: as `load_examples`.
    """
    if path is None:
        return _builtin_texts("evaluation") + _scene_examples(drawn_scenes_eval.SCENES)
    if path.is_dir() and not _files(path, TEXT_SUFFIXES) and _files(path, IMAGE_SUFFIXES):
        return _own_images(path)
    return _own_texts(path)


def builtin_text_examples() -> list[Example]:
    """Return the texts and conversations in calibration/, written for this project."""
    return _builtin_texts("calibration")


def builtin_image_examples() -> list[Example]:
    """Return conversations about the drawn scenes."""
    return _scene_examples(SCENES)


def _builtin_texts(name: str) -> list[Example]:
    folder = resources.files("vila_deploy.data") / name
    passages = (folder / "passages.txt").read_text("utf-8")
    conversations = (folder / "conversations.jsonl").read_text("utf-8")
    return [
        *_paragraphs(passages),
        *_from_lines(conversations, Path("conversations.jsonl")),
    ]


def _scene_examples(scenes: Sequence[Scene]) -> list[Example]:
    return [
        Example(question, answer, (LazyImage(scene.name, scene.image),))
        for scene in scenes
        for question, answer in scene.conversations
    ]


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with these suffixes but hidden ones: macOS leaves ._photo.jpg files."""
    matching = (file for file in folder.iterdir() if file.suffix.lower() in suffixes)
    return sorted(file for file in matching if not file.name.startswith("."))


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
        # Some Windows programs begin a file with a byte order mark.
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
    images = tuple(LazyImage.from_file(path.parent / name) for name in names)
    return Example(_unicode(value["text"]), None if answer is None else _unicode(answer), images)


def _unicode(text: str) -> str:
    """Return `text` without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _own_images(folder: Path) -> list[Example]:
    if not folder.is_dir():
        raise VilaDeployError("no such folder", where=folder, fix="give a folder of images")
    files = _files(folder, IMAGE_SUFFIXES)
    if not files:
        raise VilaDeployError(
            f"holds no image ({', '.join(IMAGE_SUFFIXES)})", where=folder, fix="add some"
        )
    return [
        Example(IMAGE_QUESTIONS[i % len(IMAGE_QUESTIONS)], None, (LazyImage.from_file(file),))
        for i, file in enumerate(files)
    ]
