"""vila-chat --batch: answer all rows of a file or a folder in one load of the engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click

from vila_deploy.cli.chat_batch_log import BatchLog
from vila_deploy.cli.chat_batch_rows import ERROR, OUTPUT, BatchRow, numbered, read_rows
from vila_deploy.cli.chat_input import video_reader
from vila_deploy.cli.common import EXIT_INTERRUPTED, echo_json
from vila_deploy.engine.manifest import MANIFEST, read_manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.processing.images import read_image
from vila_deploy.processing.placeholders import Media
from vila_deploy.processing.time_tokens import with_seconds
from vila_deploy.runtime.open_engine import OpenedEngine, open_engine, slots_that_fit
from vila_deploy.runtime.prompt import Message, Prompt, prepare_prompt
from vila_deploy.runtime.request import Event, Failed, Finished, GenerationRequest
from vila_deploy.runtime.scheduler import Scheduler
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
        slots: rows answered at once, where the engine can; None: as many as fit into memory.
        system: None: the model's own message.
    """

    engine: Path
    source: Path
    out: Path
    question: str | None
    video_frames: int | None
    slots: int | None
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
    slots = slots_that_fit(batch.engine) if batch.slots is None else batch.slots
    with (
        open_engine(batch.engine, min(slots, len(left))) as engine,
        closing(Scheduler(engine)) as scheduler,
        progress(total, "answering") as advance,
    ):
        advance(steps=total - len(left))
        for name, row, result in _results(batch, left, engine, scheduler):
            log.add(name, result)
            advance(_shown(row))


def _results(
    batch: Batch, left: Sequence[tuple[str, BatchRow]], engine: OpenedEngine, scheduler: Scheduler
) -> Iterator[tuple[str, BatchRow, dict[str, Any]]]:
    """Yield each row's result, as soon as there is one.

    So many rows are read ahead that no slot is ever idle, and no more: each holds its images.
    """
    done: SimpleQueue[tuple[str, BatchRow, dict[str, Any]]] = SimpleQueue()
    in_flight = 0
    for name, row in left:
        if in_flight == 2 * engine.session.slots:
            yield done.get()
            in_flight -= 1
        try:
            prompt, duration_s = _prompt(batch, row, engine)
            request = GenerationRequest(prompt, batch.sampling, batch.stop)
            end = partial(_finish, done.put, name, row, engine.model, duration_s)
            scheduler.submit(request, end)
            in_flight += 1
        except VilaDeployError as error:
            yield name, row, {**row.keys, ERROR: str(error)}
    for _ in range(in_flight):
        yield done.get()


def _prompt(batch: Batch, row: BatchRow, engine: OpenedEngine) -> tuple[Prompt, float]:
    """Return the prompt of a row, and the seconds of its last video."""
    media: list[Media] = [read_image(path) for path in row.images]
    frames_of = video_reader(engine.model, batch.video_frames)
    videos = [frames_of(path) for path in row.videos]
    messages = [Message("user", (*media, *videos, row.question))]
    if batch.system is not None:
        messages.insert(0, Message("system", (batch.system,)))
    prompt = prepare_prompt(messages, engine.model, engine.require_tokenizer())
    return prompt, videos[-1].duration_s if videos else 0.0


def _finish(
    put: Callable[[tuple[str, BatchRow, dict[str, Any]]], None],
    name: str,
    row: BatchRow,
    model: ModelInfo,
    duration_s: float,
    event: Event,
) -> None:
    """Put the result of a row where `_results` waits for it; the engine's thread calls this."""
    if isinstance(event, Failed):
        put((name, row, {**row.keys, ERROR: str(event.error)}))
    elif isinstance(event, Finished):
        result = {
            **row.keys,
            OUTPUT: with_seconds(event.text, model.video, duration_s),
            "finish_reason": event.finish_reason,
            "prompt_tokens": event.prompt_tokens,
            "output_tokens": event.completion_tokens,
        }
        put((name, row, result))


def _shown(row: BatchRow) -> str:
    """Return what progress names a row by."""
    files = (*row.images, *row.videos)
    return files[0].name.encode("utf-8", "replace").decode() if files else ""
