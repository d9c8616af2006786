"""Read examples to calibrate or evaluate with: built-in ones, or the user's texts and images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from vila_deploy.data import drawn_scenes_eval
from vila_deploy.data.drawn_scenes import SCENES, Scene
from vila_deploy.data.rows import Row, rows_of_lines, rows_of_list
from vila_deploy.processing.images import IMAGE_SUFFIXES, read_image
from vila_deploy.utils.errors import VilaDeployError, short

MAX_FILE_BYTES = 64 << 20
EMPTY_LINES = re.compile(r"\r?\n[^\S\n]*\n")
ROW_READERS = {".jsonl": rows_of_lines, ".json": rows_of_list}
TEXT_SUFFIXES = (".txt", *ROW_READERS)
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
    """A plain text, or a question with images, an answer, or both.

    Args:
        turns: earlier questions and answers of the same conversation; their images come first.
    """

    text: str
    answer: str | None = None
    images: tuple[LazyImage, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.answer is None and not self.images and not self.turns


def load_examples(
    texts: Path | None, images: Path | None, *, text_only: bool = False
) -> list[Example]:
    """Return the examples to calibrate with; the user's replace the built-in ones of their kind.

    Args:
        texts: a .txt file (paragraphs), a .jsonl or .json file (rows with `text` and, if wanted,
            `answer` and `image`, or with LLaVA's `conversations`), or a folder of such files.
        images: a folder of images. Paths in `texts` may be relative to it; if one is, it is no set
            of images to calibrate with besides.
        text_only: leave out every example with images.

    Raises:
        VilaDeployError: a file is of another kind, too large, or empty.
    """
    own = _own_texts(texts, images) if texts else []
    if images and not (texts and _is_searched(images, texts, own)):
        own += _own_images(images)
    examples = list(own)
    if not any(not example.images for example in own):
        examples += builtin_text_examples()
    if not any(example.images for example in own):
        examples += builtin_image_examples()
    return [e for e in examples if not (text_only and e.images)]


def _is_searched(images: Path, texts: Path, examples: Sequence[Example]) -> bool:
    """Return whether an image that `texts` name was found in the folder `images`."""
    folder = texts if texts.is_dir() else texts.parent
    paths = (Path(image.name) for example in examples for image in example.images)
    return any(p.is_relative_to(images) and not p.is_relative_to(folder) for p in paths)


def load_held_out(path: Path | None, images: Path | None = None) -> list[Example]:
    """Return the examples to evaluate with: the user's own, or the built-in ones.

    Args:
        path: as `texts` of `load_examples`, or a folder that holds images only.
        images: a folder that paths of images may be relative to, besides that of their file.

    Raises:
        VilaDeployError: as `load_examples`.
    """
    if path is None:
        return _builtin_texts("evaluation") + _scene_examples(drawn_scenes_eval.SCENES)
    if path.is_dir() and not _files(path, TEXT_SUFFIXES) and _files(path, IMAGE_SUFFIXES):
        return _own_images(path)
    return _own_texts(path, images)


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
        *(_example(row, ()) for row in rows_of_lines(conversations, Path("conversations.jsonl"))),
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


def _own_texts(path: Path, images: Path | None) -> list[Example]:
    if path.is_dir():
        files = _files(path, TEXT_SUFFIXES)
        if not files:
            raise VilaDeployError(
                f"holds no file of texts ({', '.join(TEXT_SUFFIXES)})",
                where=path,
                fix="give a folder of texts",
            )
    else:
        files = [path]
    examples = [example for file in files for example in _read_file(file, images)]
    if not examples:
        raise VilaDeployError("holds no text", where=path, fix="give a file with some paragraphs")
    return examples


def _read_file(path: Path, images: Path | None) -> list[Example]:
    fix = f"give a UTF-8 file: {', '.join(TEXT_SUFFIXES)}"
    try:
        if not path.is_file():
            what = "is no regular file" if path.exists() else "no such file"
            raise VilaDeployError(what, where=path, fix=fix)
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise VilaDeployError(
                f"{short(path.suffix)} is no kind of text file that is read", where=path, fix=fix
            )
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
    read_rows = ROW_READERS.get(path.suffix.lower())
    if read_rows is None:
        return list(_paragraphs(text))
    folders = [path.parent, *([images] if images else [])]
    return [_example(row, folders) for row in read_rows(text, path)]


def _paragraphs(text: str) -> Iterator[Example]:
    for paragraph in EMPTY_LINES.split(text):
        if paragraph.strip():
            yield Example(" ".join(paragraph.split()))


def _example(row: Row, folders: Sequence[Path]) -> Example:
    turns = tuple(zip(row.questions[:-1], row.answers, strict=False))
    answer = row.answers[-1] if len(row.answers) == len(row.questions) else None
    images = tuple(LazyImage.from_file(_find(name, folders)) for name in row.images)
    return Example(row.questions[-1], answer, images, turns)


def _find(name: str, folders: Sequence[Path]) -> Path:
    """Return the path of an image in the first of `folders` that has it.

    Raises:
        VilaDeployError: none has it.
    """
    for folder in folders:
        if os.path.lexists(folder / name):
            return folder / name
    raise VilaDeployError(
        f"no such image; looked in {' and '.join(map(str, folders))}",
        where=name,
        fix="correct the path, or give the folder that it is relative to with --calib-images",
    )


def _own_images(folder: Path) -> list[Example]:
    if not folder.is_dir():
        what = "is a file, no folder" if folder.exists() else "no such folder"
        fix = "give a folder of images; a file that names images goes to --calib"
        raise VilaDeployError(what, where=folder, fix=fix)
    files = _files(folder, IMAGE_SUFFIXES)
    if not files:
        raise VilaDeployError(
            f"holds no image ({', '.join(IMAGE_SUFFIXES)})", where=folder, fix="add some"
        )
    return [
        Example(IMAGE_QUESTIONS[i % len(IMAGE_QUESTIONS)], None, (LazyImage.from_file(file),))
        for i, file in enumerate(files)
    ]
