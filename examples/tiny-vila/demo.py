"""Quantize, build, ask, score and time the small trained model (`make demo`)."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.utils.progress import progress

if TYPE_CHECKING:
    from PIL import Image

    from vila_deploy import Conversation

    Answer = Callable[[Sequence[Image.Image], str], str]

HERE = Path(__file__).resolve().parent
CHECKPOINT, IMAGES = HERE / "checkpoint", HERE / "pictures"
OUT = Path(".demo")
SCORED_QUESTIONS = 500


def main() -> None:
    start = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()

    heading("1. Quantize the checkpoint to 4 bits: AWQ, and plain rounding to compare with")
    run("vila-quantize", CHECKPOINT, "-o", OUT / "awq", "--device", "cpu")
    run("vila-quantize", CHECKPOINT, "-o", OUT / "rtn", "--algorithm", "rtn", "--device", "cpu")

    heading("2. Build engines for this computer's CPU")
    for source, engine in ((OUT / "awq", "int4"), (OUT / "rtn", "int4-rtn"), (CHECKPOINT, "fp16")):
        run("vila-build-engine", source, "--target", "cpu", "-o", OUT / engine)

    heading("3. Ask the 4-bit model about pictures")
    for image in sorted(IMAGES.glob("*.png")):
        run("vila-chat", OUT / "int4", "--image", image, "-p", "Describe the picture.")

    heading(f"4. Score it on {SCORED_QUESTIONS} held-out questions, exact answers only")
    score()

    heading("5. Time it, fp16 and int4")
    run("vila-bench", OUT / "fp16", OUT / "int4")
    print(f"\nDone in {time.monotonic() - start:.0f} s. Ask it yourself:")
    print(f"  .venv/bin/vila-chat {OUT / 'int4'} --image {relative(first_image())}")


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def run(command: str, *args: object) -> None:
    """Show a command as the user would type it, and run it."""
    words = [command, *map(relative, args)]
    print(f"$ {shlex.join(words)}", flush=True)
    subprocess.run([Path(sys.executable).parent / command, *map(str, args)], check=True)


def relative(value: object) -> str:
    """Return `value` as text; paths below the current folder are relative to it."""
    if isinstance(value, Path) and value.is_relative_to(Path.cwd()):
        return str(value.relative_to(Path.cwd()))
    return str(value)


def first_image() -> Path:
    return min(IMAGES.glob("*.png"))


def score() -> None:
    """Print the share of right answers by kind: PyTorch in fp32, then both 4-bit engines."""
    from tiny_vila.questions import held_out
    from tiny_vila.scoring import Score
    from tiny_vila.scoring import score as score_answers

    questions = held_out(SCORED_QUESTIONS)
    scores: dict[str, Score] = {}
    with progress(3 * len(questions), "asking") as advance:
        for name, answerer in (
            ("fp32 (PyTorch)", reference()),
            ("int4 AWQ", engine(OUT / "int4")),
            ("int4 rounded", engine(OUT / "int4-rtn")),
        ):
            with answerer as answer:
                scores[name] = score_answers(answer, questions, on_answer=advance)
    kinds = list(dict.fromkeys(question.kind for question in questions))
    width = max(map(len, kinds)) + 2
    print(" " * width + "".join(f"{name:>18}" for name in scores))
    for kind in kinds:
        shares = (s.right[kind] / s.asked[kind] for s in scores.values())
        print(kind.ljust(width) + "".join(f"{share:>18.1%}" for share in shares))
    print("all".ljust(width) + "".join(f"{s.accuracy:>18.1%}" for s in scores.values()))


@contextmanager
def reference() -> Iterator[Answer]:
    """Yield the answers of the checkpoint as trained, in PyTorch."""
    from vila_deploy import Conversation
    from vila_deploy.checkpoint import open_checkpoint
    from vila_deploy.engine.model_info import ModelInfo
    from vila_deploy.engine.session import OneSlot
    from vila_deploy.model.vila import ReferenceSession
    from vila_deploy.processing.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(CHECKPOINT)
    tokenizer = load_tokenizer(CHECKPOINT / "llm")
    session = OneSlot(ReferenceSession(checkpoint))
    model = ModelInfo.from_config(checkpoint.config, tokenizer)
    yield answerer(lambda: Conversation(session, tokenizer, model, session.max_seq_len))


@contextmanager
def engine(folder: Path) -> Iterator[Answer]:
    """Yield the answers of a built engine."""
    from vila_deploy import open_engine

    with open_engine(folder) as opened:
        yield answerer(opened.chat)


def answerer(chat: Callable[[], Conversation]) -> Answer:
    """Return the function (images, prompt) → greedy answer, each a conversation of its own."""
    from vila_deploy import SamplingParams

    sampling = SamplingParams(max_new_tokens=96)
    return lambda images, prompt: chat().ask(prompt, images, sampling).text


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
