"""Writes held-out questions as a folder for vila-eval: questions.jsonl and its images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tiny_vila.questions import held_out


def write(folder: Path, count: int) -> None:
    """Write the first `count` questions into a new folder."""
    folder.mkdir(parents=True)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for number, question in enumerate(held_out(count)):
            names = []
            for place, image in enumerate(question.images):
                names.append(f"{number}-{place}.png")
                image.save(folder / names[-1])
            row = {"image": names, "question": question.prompt, "answer": question.answer}
            lines.write(json.dumps({**row, "category": question.kind}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args()
    write(options.folder, options.questions)


if __name__ == "__main__":
    main()
