"""vila-chat --batch: answer all rows of a file or a folder in one load of the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from vila_deploy.cli.chat_batch_log import BatchLog
from vila_deploy.cli.chat_batch_rows import ERROR, OUTPUT, BatchRow, numbered, read_rows
from vila_deploy.cli.chat_input import video_reader
from vila_deploy.cli.common import EXIT_INTERRUPTED, echo_json
from vila_deploy.engine.manifest import MANIFEST, read_manifest
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.processing.images import read_image
from vila_deploy.processing.video import VideoFrames
from vila_deploy.runtime.conversation import Answer, Conversation, MediaSource
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import sha256_file
from vila_deploy.utils.progress import progress


@dataclass(frozen=True)
class Batch:
    """What to ask, and how.

    Args:
        source: a .jsonl file or a folder of images.
        question: asked where a row has none.
        video_frames: images from each video; None: the model's own number.
        system: None: the model's own message.
    """

    engine: Path
    source: Path
    out: Path
    question: str | None
    video_frames: int | None
    system: str | None
    sampling: SamplingParams
    stop: tuple[str, ...]

    def job(self) -> dict[str, Any]:
        """Return what every answer depends on, but for its row."""
        read_manifest(self.engine)
        return {
            "engine": sha256_file(self.engine / MANIFEST),
            "video_frames": self.video_frames,
            "system": self.system,
            "sampling": asdict(self.sampling),
            "stop": self.stop,
        }


def run(batch: Batch, resume: bool, as_json: bool) -> None:
    """Write `batch.out`; what an earlier run has answered is not asked again with `resume`.

    Raises:
        VilaDeployError: rows, engine or output are not as they must be; or, when all is written,
            some rows have failed.
    """
    rows = read_rows(batch.source, batch.question)
    names = numbered(rows)
    log = BatchLog(batch.out, batch.job(), resume)
    left = [
        (name, row)
        for name, row in zip(names, rows, strict=True)
        if ERROR in log.results.get(name, {ERROR: "not asked yet"})
    ]
    try:
        if left:
            _answer(batch, left, log, len(rows))
        failures = log.finish(names, lambda result: ERROR in result)
    except KeyboardInterrupt:
        if not log.results:
            raise
        click.echo(
            f"interrupted: {len(log.results)} of {len(rows)} results are kept in {log.path}; "
            f"{'the same command goes on' if resume else '--resume goes on from there'}",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    finally:
        log.close()
    if as_json:
        echo_json({"out": str(batch.out), "rows": len(rows), "failed": failures})
    else:
        click.echo(f"{batch.out}: {len(rows) - failures} of {len(rows)} rows answered")
    if failures:
        raise VilaDeployError(
            f"{failures} of {len(rows)} rows have failed",
            where=batch.out,
            fix=f"see {ERROR!r} of each, mend them, and ask them again with --resume",
        )


def _answer(batch: Batch, left: Sequence[tuple[str, BatchRow]], log: BatchLog, total: int) -> None:
    with open_engine(batch.engine) as engine, progress(total, "answering") as advance:
        # One conversation, begun anew for each row: it keeps images that several rows ask about.
        conversation = engine.chat(batch.system)
        frames_of = video_reader(engine.model, batch.video_frames)
        advance(steps=total - len(left))
        for name, row in left:
            conversation.reset()
            log.add(name, _result(batch, row, conversation, frames_of))
            advance(_shown(row))


def _result(
    batch: Batch,
    row: BatchRow,
    conversation: Conversation,
    frames_of: Callable[[Path], VideoFrames],
) -> dict[str, Any]:
    """Return a row with its answer, or with the error that its files or its question make."""
    try:
        media: list[MediaSource] = [read_image(path) for path in row.images]
        media += [frames_of(path) for path in row.videos]
        answer: Answer = conversation.ask(row.question, media, batch.sampling, stop=batch.stop)
    except VilaDeployError as error:
        return {**row.keys, ERROR: str(error)}
    return {
        **row.keys,
        OUTPUT: answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": len(answer.tokens),
    }


def _shown(row: BatchRow) -> str:
    """Return what progress names a row by."""
    files = (*row.images, *row.videos)
    return files[0].name.encode("utf-8", "replace").decode() if files else ""
